"""Every row of the support table, by section."""

from __future__ import annotations

from tests.support import attention_and_recurrence, layers, losses
from tests.support.case import Case

SECTIONS: dict[str, list[Case]] = {
    "Linear layers and convolution": layers.LINEAR,
    "Normalization": layers.NORMALIZATION,
    "Activations": layers.ACTIVATIONS,
    "Pooling": layers.POOLING,
    "Dropout": layers.DROPOUT,
    "Embeddings": layers.EMBEDDING,
    "Attention": attention_and_recurrence.ATTENTION,
    "Recurrent networks": attention_and_recurrence.RECURRENCE,
    "Losses": losses.LOSSES,
    "Distances": losses.DISTANCES,
    "Resampling and shapes": losses.SHAPES,
    "Operators": losses.OPERATORS,
    "Around layers": losses.AROUND,
}
CASES = [case for section in SECTIONS.values() for case in section]
