"""The two ways in which a network takes its inputs: padded rows with a mask, or one row of documents end to end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from scaletrain.errors import ModelError
from scaletrain.model import attention
from scaletrain.model.config import LAYOUTS, Layout, max_positions, position_offset


class Arrangement:
    """One network in one layout. Raises ModelError for one in which the network's documents would attend to each other."""

    def __init__(self, network: PreTrainedModel, layout: Layout) -> None:
        config = network.config
        model_type = str(config.model_type)
        if layout not in LAYOUTS[model_type]:
            rule = f"{model_type} keeps documents apart only in: {', '.join(LAYOUTS[model_type])}"
            raise ModelError("model.layout", layout, rule, f"Set model.layout={LAYOUTS[model_type][0]}")
        self.layout = layout
        self.token_types = int(getattr(config, "type_vocab_size", 0)) > 1
        """Whether it tells the second part of a pair from the first by `token_type_ids`."""
        self._offset = position_offset(model_type, int(config.pad_token_id or 0))
        self.max_positions = max_positions(config)
        """Longest row or document in tokens."""
        if layout == "unpadded":
            attention.register()
            network.set_attn_implementation(attention.NAME)

    def inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Any]:
        """Keyword arguments of the network; of the unpadded layout, with `documents`.

        `input_ids` [batch, length]; `attention_mask` the same, 1 for a token and 0 for padding (none: no padding; faster);
        `token_type_ids` the same, 1 in the second part of a pair.
        Unpadded: `input_ids` and `position_ids` are [1, tokens], the positions counting from 0 in every document, and
        `cu_seqlens` [documents + 1] holds the boundaries, best on the CPU. Raises ModelError for the inputs of the other layout,
        and for token types where the network has none.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            if not self.token_types:
                rule = "the encoder does not tell parts of a pair apart by them"
                raise ModelError("token_type_ids", tuple(token_type_ids.shape), rule, "Collate without them")
            inputs["token_type_ids"] = token_type_ids
        if position_ids is not None:
            inputs["position_ids"] = position_ids + self._offset
        if self.layout == "unpadded":
            if cu_seqlens is None or position_ids is None or attention_mask is not None or input_ids.shape[0] != 1:
                rule = "needs one row with position_ids and cu_seqlens, and no attention_mask"
                raise ModelError("layout unpadded", tuple(input_ids.shape), rule, "Collate for the layout of the model")
            inputs["documents"] = attention.Documents(cu_seqlens, tokens=input_ids.shape[1], device=input_ids.device)
        elif cu_seqlens is not None:
            raise ModelError("layout padded", "cu_seqlens", "must not be given", "Collate for the layout of the model")
        return inputs
