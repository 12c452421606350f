from __future__ import annotations

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    DbrxConfig,
    EncoderDecoderConfig,
    GPT2Config,
    LEDConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    RobertaConfig,
    RwkvConfig,
    T5Config,
    WhisperConfig,
    XLNetConfig,
)

from drkl.data.lengths import Room
from drkl.models.context import context_of, contexts_of, room_of

CONFIGS: list[tuple[PreTrainedConfig, tuple[int | None, int | None]]] = [
    (LlamaConfig(max_position_embeddings=30), (30, 30)),
    (GPT2Config(n_positions=30), (30, 30)),
    (MptConfig(max_seq_len=30), (30, 30)),
    (DbrxConfig(max_seq_len=30), (30, 30)),
    (RwkvConfig(context_length=30), (30, 30)),
    (BloomConfig(), (None, None)),
    (MambaConfig(), (None, None)),
    (XLNetConfig(), (None, None)),  # max_position_embeddings is -1
    (T5Config(), (None, None)),
    (BartConfig(max_position_embeddings=30), (30, 30)),
    (WhisperConfig(max_source_positions=50, max_target_positions=30), (50, 30)),
    (LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=30, attention_window=16), (64, 30)),
    # The encoder's input is filled up to windows of 16: six of them fit.
    (LEDConfig(max_encoder_position_embeddings=100, max_decoder_position_embeddings=30, attention_window=16), (96, 30)),
    # The first position is pad_token_id + 1.
    (RobertaConfig(max_position_embeddings=34, pad_token_id=1), (32, 32)),
    (
        EncoderDecoderConfig(encoder=BertConfig(max_position_embeddings=20), decoder=GPT2Config(n_positions=30)),
        (20, 30),
    ),
]


@pytest.mark.parametrize(("config", "contexts"), CONFIGS, ids=lambda value: getattr(value, "model_type", str(value)))
def test_contexts(config: PreTrainedConfig, contexts: tuple[int | None, int | None]) -> None:
    assert contexts_of(config) == contexts
    assert context_of(config) == (None if None in contexts else min(contexts))  # type: ignore[type-var]


def test_several_models_have_the_room_of_the_smallest() -> None:
    long, short, endless = LlamaConfig(max_position_embeddings=64), GPT2Config(n_positions=30), BloomConfig()
    assert room_of([long, endless, short], encoder_decoder=False) == Room(30, 30)
    assert room_of([endless], encoder_decoder=False) == Room()
    led = LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=30, attention_window=16)
    bart = BartConfig(max_position_embeddings=48)
    assert room_of([led, bart], encoder_decoder=True) == Room(48, 30, separate=True)
    # A classifier's encoder and decoder both read the text.
    assert room_of([led], encoder_decoder=False) == Room(30, 30)
