from tests.small_tensors import one_thread, unchecked

__all__ = ["one_thread", "unchecked"]
