"""Students of bare logits that follow a known teacher, so that every distance is exact: docs/toy.md."""
