# SPDX-License-Identifier: Apache-2.0
"""Model families as descriptions: where the attention projections are and how positions enter.

Calibration reads a Hugging Face model through a description, the plugin builds vLLM's model of
the same architecture through it. A new family is one more row in `FAMILIES`, never a copied model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.errors import UnsupportedModelError


@dataclass(frozen=True)
class Experts:
    """How a checkpoint holds the experts of a layer's MLP, each with matrices of its own.

    transformers calls the MLP `mlp`, and fuses gates and up-projections of all experts, and
    down-projections.

    Attributes:
        mlp: name of the MLP inside a layer.
        gate, up, down: names of the projections inside `<mlp>.experts.<number>`.
    """

    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def model_name(self, name: str) -> str:
        """A name of the checkpoint in transformers' model, if it is not one of an expert."""
        return ".".join("mlp" if part == self.mlp else part for part in name.split("."))


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Module paths are dotted attribute names, equal to the parameter names in the checkpoint.

    Attributes:
        architecture: the base class name, e.g. `LlamaForCausalLM`.
        decoder: the module that owns `layers`, its embeddings and its final norm.
        layers: name of the layer list inside `decoder`.
        attention: name of the attention module inside a layer.
        q_proj, k_proj, v_proj, o_proj: names of the linear maps inside the attention module.
        rotary: whether keys and queries are rotated by position before their dot product, all of a
            head or its first dimensions.
        q_norm, k_norm: names of the norms of query and key heads before rotation, if any.
        interleaved: whether RoPE pairs are neighbouring dimensions, (2 i, 2 i + 1), and not halves
            of what rotates, (i, i + n).
        wide_norms: whether these norms are of all heads together, and not of each.
        heads_first: whether transformers applies these norms to [batch, heads, tokens, size], and
            not to [batch, tokens, heads, size].
        full_every: of a family that mixes layers with full attention and with sliding windows:
            one in so many is full where `config.json` does not list `layer_types`. The others keep
            their cache as it is. 0: all layers are of one kind.
        qkv_proj: name of the fused projection that holds queries, keys and values in the base
            checkpoint, one after the other, if they are fused there; Eigen checkpoints have them
            apart.
        soft_cap: whether scores pass a soft cap. A constant in all scores of a query matters then,
            so keys are cached before RoPE only, where their offset is added again.
        eager_only: whether transformers computes its attention as written in eager mode alone.
        experts: how the checkpoint holds the experts of the MLPs, if there are any.
        aliases: other names of the architecture in `config.json`.
        required: configuration fields (dotted) that must have a value, where they are given, for
            the model to be what the description says.
    """

    model_type: str
    architecture: str
    decoder: str
    layers: str
    attention: str
    q_proj: str
    k_proj: str
    v_proj: str
    o_proj: str
    rotary: bool
    q_norm: str = ""
    k_norm: str = ""
    interleaved: bool = False
    wide_norms: bool = False
    heads_first: bool = False
    full_every: int = 0
    qkv_proj: str = ""
    soft_cap: bool = False
    eager_only: bool = False
    experts: Experts | None = None
    aliases: tuple[str, ...] = ()
    required: tuple[tuple[str, bool | int], ...] = ()

    @property
    def eigen_architecture(self) -> str:
        """Name under which the compressed model is registered in vLLM."""
        return f"Eigen{self.architecture}"

    @property
    def key_modes(self) -> tuple[KeyMode, ...]:
        """Key-cache modes the family allows, the default first."""
        if not self.rotary:
            return (KeyMode.NO_ROPE,)
        return (KeyMode.PRE_ROPE,) if self.soft_cap else (KeyMode.PRE_ROPE, KeyMode.POST_ROPE)

    def clips(self, config: Mapping[str, Any]) -> bool:
        """Whether queries, keys and values are clipped once projected."""
        return bool(_field(config, "attn_config.clip_qkv"))

    def attention_path(self, layer: int) -> str:
        """Dotted path of a layer's attention module, e.g. `model.layers.3.self_attn`."""
        return f"{self.decoder}.{self.layers}.{layer}.{self.attention}"

    def compressed_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The layers whose cache is compressed: all, or of a mixed model those with full attention.

        A layer with a sliding window caches no more than the window.

        Raises:
            UnsupportedModelError: `layer_types` does not fit, or no layer has full attention.
        """
        count = self.geometry(config).num_layers
        if not self.full_every:
            return tuple(range(count))
        every = int(config.get("sliding_window_pattern") or self.full_every)
        kinds = config.get("layer_types") or [
            "sliding_attention" if (index + 1) % every else "full_attention"
            for index in range(count)
        ]
        found = tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")
        if len(kinds) != count or not found:
            raise UnsupportedModelError(
                f"config.json of {self.architecture}: layer_types lists {len(kinds)} layers, "
                f"{len(found)} of them full_attention; needed are {count}, and at least one"
            )
        return found

    def check_required(self, config: Mapping[str, Any]) -> None:
        """Refuse a model with an option that the description does not cover.

        Raises:
            UnsupportedModelError: names the option.
        """
        for name, wanted in self.required:
            found = _field(config, name)
            if found is not None and found != wanted:
                raise UnsupportedModelError(
                    f"config.json of {self.architecture}: {name}={str(found).lower()} is not "
                    f"supported; supported: {str(wanted).lower()}"
                )

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Head counts and sizes from a `config.json` dictionary.

        Raises:
            UnsupportedModelError: a needed field is missing or has a value that is not supported,
                or the sizes do not divide.
        """
        self.check_required(config)
        try:
            hidden_size = int(config.get("hidden_size") or config["d_model"])
            num_heads = int(config.get("num_attention_heads") or config["n_heads"])
            num_layers = int(config.get("num_hidden_layers") or config["n_layers"])
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"config.json of {self.architecture}: field {error} is missing or not a number"
            ) from error
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        head_size = int(config.get("head_dim") or hidden_size // max(num_heads, 1))
        if num_heads < 1 or num_heads % num_kv_heads:
            raise UnsupportedModelError(
                f"config.json of {self.architecture}: {num_heads} query heads cannot share "
                f"{num_kv_heads} KV heads"
            )
        return Geometry(num_layers, num_heads, num_kv_heads, head_size, hidden_size)


@dataclass(frozen=True)
class Geometry:
    """Sizes of the uncompressed attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        kv_size = self.num_kv_heads * self.head_size
        return self.num_heads * self.head_size, kv_size, kv_size


_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    decoder="model",
    layers="layers",
    attention="self_attn",
    q_proj="q_proj",
    k_proj="k_proj",
    v_proj="v_proj",
    o_proj="o_proj",
    rotary=True,
)

FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral", architecture="MistralForCausalLM"),
    replace(_LLAMA, model_type="qwen2", architecture="Qwen2ForCausalLM"),
    replace(
        _LLAMA,
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        q_norm="q_norm",
        k_norm="k_norm",
    ),
    replace(
        _LLAMA,
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        q_norm="q_norm",
        k_norm="k_norm",
        heads_first=True,
        full_every=6,
        required=(("use_bidirectional_attention", False),),
    ),
    replace(
        _LLAMA,
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        full_every=2,
        soft_cap=True,
        eager_only=True,
        required=(("use_bidirectional_attention", False),),
    ),
    replace(_LLAMA, model_type="phi3", architecture="Phi3ForCausalLM", qkv_proj="qkv_proj"),
    replace(_LLAMA, model_type="granite", architecture="GraniteForCausalLM"),
    replace(
        _LLAMA,
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        # vLLM builds neither.
        required=(("qk_layernorm", False), ("use_parallel_residual", False)),
    ),
    replace(_LLAMA, model_type="glm4", architecture="Glm4ForCausalLM", interleaved=True),
    replace(
        _LLAMA,
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        q_norm="q_norm",
        k_norm="k_norm",
        wide_norms=True,
    ),
    replace(_LLAMA, model_type="starcoder2", architecture="Starcoder2ForCausalLM"),
    replace(
        _LLAMA,
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        experts=Experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    replace(_LLAMA, model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM", experts=Experts()),
    replace(
        _LLAMA,
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        q_norm="q_norm",
        k_norm="k_norm",
        experts=Experts(),
    ),
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        decoder="model.decoder",
        layers="layers",
        attention="self_attn",
        q_proj="q_proj",
        k_proj="k_proj",
        v_proj="v_proj",
        o_proj="out_proj",
        rotary=False,
    ),
    Family(
        model_type="mpt",
        architecture="MptForCausalLM",
        decoder="transformer",
        layers="blocks",
        attention="attn",
        q_proj="q_proj",
        k_proj="k_proj",
        v_proj="v_proj",
        o_proj="out_proj",
        rotary=False,
        qkv_proj="Wqkv",
        eager_only=True,
        aliases=("MPTForCausalLM",),
        required=(
            ("attn_config.alibi", True),
            ("attn_config.prefix_lm", False),
            ("attn_config.qk_ln", False),
            ("no_bias", True),
            # transformers builds this width whatever the config says, and vLLM would cut weights.
            ("expansion_ratio", 4),
        ),
    ),
)


_MLA = "its attention, MLA, caches latents already"
_STATES = "it has state layers beside its attention, which is gated"
_SINKS = "its attention has sinks, which the kernels do not know"
NOT_SERVED: Mapping[str, str] = {
    "DeepseekV2ForCausalLM": _MLA,
    "DeepseekV3ForCausalLM": _MLA,
    "Gemma3ForConditionalGeneration": "it takes images; its text model is supported",
    "GptOssForCausalLM": _SINKS,
    "GraniteMoeHybridForCausalLM": "it has state layers beside its attention",
    "GraniteSWAForCausalLM": _SINKS,
    "Qwen3NextForCausalLM": _STATES,
    "Qwen3_5ForCausalLM": _STATES,
    "Qwen3_5MoeForCausalLM": _STATES,
}
"""Why an architecture has no description."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family named by a `config.json` dictionary, base or Eigen.

    Raises:
        UnsupportedModelError: no description fits; the message lists those there are.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        names = (family.architecture, family.eigen_architecture, *family.aliases)
        if any(name in architectures for name in names):
            return family
    named = ", ".join(map(str, architectures)) or f"model_type {config.get('model_type')!r}"
    reasons = [f" ({NOT_SERVED[name]})" for name in architectures if name in NOT_SERVED]
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise UnsupportedModelError(
        f"architecture {named} is not supported{''.join(reasons)}; supported: {supported}"
    )


def _field(config: Mapping[str, Any], path: str) -> Any:
    """A field of nested dictionaries by its dotted path, or None."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
