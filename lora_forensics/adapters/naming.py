"""What a module's name tells: component, block number, role. Names are data; an unknown one is `other`."""

from __future__ import annotations

import re
from functools import lru_cache

_PREFIXES = (
    ("lora_te3_", "text_encoder_3"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("lora_transformer_", "transformer"),
    ("transformer.", "transformer"),
    ("unet.", "unet"),
    ("lora_unet_", ""),
    ("diffusion_model.", ""),
    ("base_model.model.", ""),
)
"""Key prefixes; '' where the rest of the name decides."""

_UNET = re.compile(
    r"((down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]"
    r"|(conv_in|conv_out|time_embed|time_embedding|add_embedding|label_emb|out)([._]|$))"
)
_TRANSFORMER = re.compile(
    r"(^|[._])(double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|blocks|"
    r"context_refiner|noise_refiner|final_layer|x_embedder|img_in|txt_in)([._]|$)"
)
_LANGUAGE = re.compile(r"(^|[._])(model|layers|layer|h|lm_head|encoder|decoder|language_model)([._]|$)")

ROLES = (
    ("norm", r"(layer_?norm|norm\d*|ln_[\df]|.*_norm)"),
    ("head", r"(lm_head|embed_out|score|classifier)"),
    ("embedding", r"(embed_tokens|wte|wpe|word_embeddings|.*_embeddings?|embedding)"),
    ("qkv", r"(to_)?qkv(_proj|_mlp_proj)?|.*query_key_value|attn[._]c_attn|c_attn|in_proj(_weight)?|wqkv|add_qkv_proj"),
    ("q", r"(to_q|q_proj|query|q_lin|wq|add_q_proj|q)"),
    ("k", r"(to_k|k_proj|key|k_lin|wk|add_k_proj|k)"),
    ("v", r"(to_v|v_proj|value|v_lin|wv|add_v_proj|v)"),
    (
        "out",
        r"(to_out([._]0)?|o_proj|out_proj|out_lin|to_add_out|(attn|attention)\d?[._](output[._])?(proj|wo|dense|c_proj|o))",
    ),
    ("gate", r"(gate_proj|wi_0|w1)"),
    ("up", r"(up_proj|gate_up_proj|wi_1|w3)"),
    ("down", r"(down_proj|w2)"),
    (
        "ff_in",
        r"((ff|\w*mlp)\w*[._]net[._]0[._]proj|ffn[._]0|fc1|c_fc|linear_1|dense_h_to_4h|intermediate[._]dense|mlp\w*[._]0|fc_in|wi)",
    ),
    (
        "ff_out",
        r"((ff|\w*mlp)\w*[._]net[._]2|ffn[._]2|fc2|mlp[._]c_proj|linear_2|dense_4h_to_h|output[._]dense|mlp\w*[._]2|fc_out|wo)",
    ),
    ("proj_in", r"proj_in"),
    ("proj_out", r"proj_out"),
    ("conv", r"(conv\w*|in_layers[._]2|out_layers[._]3|skip_connection|downsamplers[._]0[._]conv|op)"),
)
"""Role and the end of the module names that have it; the first that fits counts."""

_ROLES = tuple((role, re.compile(rf"(^|.*[._])({pattern})$")) for role, pattern in ROLES)
_TRAINER_TAIL = re.compile(r"(_lora\d?|[._]lora_linear_layer|[._]lora)$")
_NUMBER = re.compile(r"(?:^|[._])(\d+)(?=[._]|$)")


def component(module: str) -> str:
    """Part of the model: unet, transformer, text_encoder(_2, _3), model or other."""
    for prefix, name in _PREFIXES:
        if module.startswith(prefix) and name:
            return name
    rest = without_prefix(module)
    if _UNET.match(rest):
        return "unet"
    if module.startswith(("lora_unet_", "diffusion_model.")):
        return "transformer"
    if _TRANSFORMER.match(rest):
        return "transformer"
    return "model" if module.startswith("base_model.") or _LANGUAGE.search(rest) else "other"


def block(module: str) -> int | None:
    """The first number in the name behind its prefix."""
    found = _NUMBER.search(without_prefix(module))
    return int(found.group(1)) if found else None


@lru_cache(maxsize=65536)
def role(module: str) -> str:
    """What the module does in its block, or `other`."""
    name = _TRAINER_TAIL.sub("", without_prefix(module))
    return next((role for role, pattern in _ROLES if pattern.match(name)), "other")


def without_prefix(module: str) -> str:
    """The name behind the prefix that a trainer puts before it."""
    for prefix, _ in _PREFIXES:
        if module.startswith(prefix):
            return module[len(prefix) :]
    return module
