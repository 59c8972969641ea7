"""A text encoder that reads a grid's text cell by cell: fixed weights, and the files of any transformers encoder.

A token is one cell; the last one ends the text. Its state says what the cell is and where on the canvas it stands, nothing of other
cells: what follows from them is left to the model. A run takes it as ``encoders.text_encoder=DATA/encoder``.
"""

import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rmoe_megatron.data.mazes.grid import CHARACTERS, ROW_END

PAD, END, UNKNOWN = "[PAD]", "[END]", "[UNK]"
VOCABULARY = (PAD, END, UNKNOWN, *CHARACTERS)
SYMBOL_SIZE, PLACE_SIZE = 8, 24  # dimensions of a token's state
HIDDEN_SIZE = SYMBOL_SIZE + PLACE_SIZE


def text_length(canvas: int) -> int:
    """Return the number of tokens of a canvas of ``canvas`` x ``canvas`` cells."""
    return canvas**2 + 1


def write_encoder(folder: Path, canvas: int) -> None:
    """Write encoder and tokenizer of a canvas as a transformers folder."""
    _tokenizer(canvas).save_pretrained(folder)
    _encoder(canvas).save_pretrained(folder)


def _tokenizer(canvas: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Replace(ROW_END, "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, VOCABULARY.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, model_max_length=text_length(canvas)
    )


def _encoder(canvas: int) -> BertModel:
    """Return a BERT of one layer that adds nothing: a state is the embedding of symbol and place, normalised."""
    model = BertModel(
        BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=1,
            max_position_embeddings=text_length(canvas),
            type_vocab_size=1,
            pad_token_id=VOCABULARY.index(PAD),
        ),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float(name.endswith("LayerNorm.weight")))
        embeddings = model.embeddings
        # A symbol weighs as much as a place: PLACE_SIZE sines and cosines have the norm sqrt(PLACE_SIZE / 2).
        symbols = math.sqrt(PLACE_SIZE / 2) * torch.eye(len(VOCABULARY), SYMBOL_SIZE)
        embeddings.word_embeddings.weight[:, :SYMBOL_SIZE] = symbols
        embeddings.position_embeddings.weight[: canvas**2, SYMBOL_SIZE:] = _places(canvas)
    return model.eval()


def _places(canvas: int) -> torch.Tensor:
    """Return sines and cosines of the row and the column of every cell, float32 [N^2, PLACE_SIZE]."""
    count = PLACE_SIZE // 4
    frequencies = math.pi * 2.0 ** -torch.arange(count)
    angles = torch.arange(canvas)[:, None] * frequencies
    along = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((along.repeat_interleave(canvas, dim=0), along.repeat(canvas, 1)), dim=1)
