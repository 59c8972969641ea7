"""The recurrence without its layers: keys, FLOPs, parameters, names of weights."""

from typing import TYPE_CHECKING, Any

from rmoe_megatron.config.model import ModelConfig, RecurrenceConfig
from rmoe_megatron.config.require import require
from rmoe_megatron.model.adapter import Adapter
from rmoe_megatron.model.family import attention_multiply_adds, linear_parameters

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from rmoe_megatron.model.precision.layers import Layers

GATE_INPUTS = ("tokens", "unmodulated_tokens", "conditioning")
TOKEN_INPUTS = GATE_INPUTS[:2]


class RecurrenceAdapter(Adapter[RecurrenceConfig]):
    """M experts, picked by a gate for each vision token in each of T latent steps."""

    name = "recurrence"
    weight_names = {
        "modulation.linear.weight": "recurrence.modulation.weight",
        "modulation.linear.bias": "recurrence.modulation.bias",
        "gate.weight": "recurrence.gate.token.weight",
        "gate.conditioning_weight": "recurrence.gate.conditioning.weight",
        "experts.down": "recurrence.experts.down.weight",
        "experts.up": "recurrence.experts.up.weight",
        "experts.weight": "recurrence.experts.weight",
    }

    def check(self, model: ModelConfig, section: RecurrenceConfig) -> None:
        """Check rank and gate inputs."""
        require(
            section.rank is None or section.rank <= model.hidden_size,
            f"recurrence.rank ({section.rank}) exceeds model.hidden_size ({model.hidden_size}), where a product of two "
            "factors has no use for it; choose a smaller rank, or null for modules of full rank.",
        )
        inputs = section.gate_inputs
        require(
            len(inputs) > 0
            and set(inputs) <= set(GATE_INPUTS)
            and len(set(inputs)) == len(inputs)
            and not set(TOKEN_INPUTS) <= set(inputs),
            f"recurrence.gate_inputs {inputs} must be conditioning, tokens or unmodulated_tokens, or conditioning and one of the others.",
        )

    def spec(self, section: RecurrenceConfig, layers: "Layers") -> "ModuleSpec":
        """Return the module ``Recurrence`` with the experts of a block's precision."""
        from rmoe_megatron.model.recurrence.recurrence import recurrence_spec

        return recurrence_spec(section, layers.experts)

    def multiply_adds(self, model: ModelConfig, section: RecurrenceConfig, vision: int) -> float:
        """Return experts and gate of every latent step, the attention of all but the last, and the one modulation."""
        text, hidden = model.text_length, model.hidden_size
        expert = 3 * hidden**2 if section.rank is None else 6 * hidden * section.rank
        gate = section.num_modules * hidden if set(TOKEN_INPUTS) & set(section.gate_inputs) else 0
        step, modulation = vision * (expert + gate), 2 * hidden**2 if section.modulation else 0
        intermediate = vision * hidden**2 + attention_multiply_adds(vision, vision + text, hidden)
        return section.steps * step + modulation + (section.steps - 1) * intermediate

    def parameters(self, model: ModelConfig, section: RecurrenceConfig) -> int:
        """Return the number of parameters of gate and modulation."""
        hidden = model.hidden_size
        gate = section.num_modules * hidden * len(section.gate_inputs)
        return gate + (linear_parameters(hidden, 2 * hidden) if section.modulation else 0)

    def expert_parameters(self, model: ModelConfig, section: RecurrenceConfig) -> int:
        """Return the number of parameters of all M experts."""
        hidden = model.hidden_size
        expert = 3 * hidden**2 if section.rank is None else 6 * hidden * section.rank
        return section.num_modules * expert

    def transformer_settings(self, section: RecurrenceConfig) -> dict[str, Any]:
        """Return Megatron-Core's settings of the experts: M of them, top-1, all-to-all dispatch, dropless."""
        return {
            "num_moe_experts": section.num_modules,
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,  # Megatron-Core asks for it at top-1; the gate computes its own weights
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": section.aux_loss_coeff,
            "moe_z_loss_coeff": section.z_loss_coeff or None,
        }
