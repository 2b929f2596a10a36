"""What tells one family of checkpoints from another, and config.json, in and out.

A setting may be written in many ways; one that would change the result is refused by its key.
"""

from typing import NamedTuple

from lab.tools.checks import require
from lab.tools.cli import note
from moe import Experts, MoE, MoEConfig, MoETransformer, Router, unwrapped

MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Family(NamedTuple):
    """What tells one family of checkpoints from another."""

    words: dict[str, str]  # parts of names for which it has words of its own
    qk_norm: str  # where queries and keys are normalised, see MoEConfig
    rope_theta: float  # where config.json gives none


FAMILIES = {  # by the model_type of config.json
    "olmoe": Family({}, "full", 1e4),
    "deepseek": Family({}, "none", 1e4),
    "mixtral": Family(MIXTRAL, "none", 1e6),
    "qwen3_moe": Family({}, "head", 1e4),
}


# ------------------------------------------------------------------------ config.json as it is read

LIMITS = {int: (1, 2**18), float: (1e-12, 1e12), bool: (False, True)}
REQUIRED = object()  # the default of a setting that has none
NEUTRAL = {  # keys that can change the result of a model -> the values that do not
    "hidden_act": ["silu", "swish"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "scoring_func": ["softmax"],
    "n_group": [1],
    "topk_group": [1],
    "topk_method": ["greedy", "group_limited_greedy"],  # the same for one group
    "routed_scaling_factor": [1],
    "partial_rotary_factor": [1],
    "quantization": [],  # as MLX says it
    "quantization_config": [],
}
ROPE = {  # the same for keys of rope_scaling and rope_parameters; others are of other rope_types
    "rope_type": ["default"],
    "factor": [1],
    "attention_factor": [1],
    "partial_rotary_factor": [1],
}
FACTORED = ("linear", "dynamic", "yarn", "llama3")  # rope_types that a factor of 1 makes neutral


class Settings:
    """The settings of a config.json, each checked when it is asked for. null counts as absent."""

    def __init__(self, raw: dict, path):
        self.path = path
        self.raw = {key: value for key, value in raw.items() if value is not None}
        # What stands within an object becomes a key of its own, such as rope_scaling.factor.
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.raw.get(key)
            if not isinstance(rope, dict) or any(isinstance(each, dict) for each in rope.values()):
                continue  # refused later: one rope for each kind of layer
            del self.raw[key]
            if "type" in rope:
                rope = {"rope_type": rope["type"]} | rope
            if rope.get("rope_type") in FACTORED and rope.get("factor") == 1:
                rope = rope | {"rope_type": "default"}
            for inner, value in rope.items():
                if value is not None:
                    self.raw[f"{key}.{inner}"] = value

    def get(self, kind: type, *keys: str, default=REQUIRED, low=None, high=None):
        """The value that stands under one of these keys, or under several that agree.

        kind: int, float or bool, however it is written: 16.0 is an int, 0 and 1 are bools. low,
        high: its limits. ValueError that names the key.
        """
        given = {key: self.raw[key] for key in keys if key in self.raw}
        if not given:
            missing = f"{self.path} has no {' or '.join(keys)}"
            require(default is not REQUIRED, missing)
            return default

        lowest, highest = LIMITS[kind]
        low = lowest if low is None else low
        high = highest if high is None else high
        for key, value in given.items():
            number = type(value) in (int, float) or (kind is bool and type(value) is bool)
            fits = number and low <= value <= high and kind(value) == value
            expected = f"expected {kind.__name__} from {low} to {high}"
            require(fits, f"{self.path}: {key} is {value!r:.60}; {expected}")
        return kind(self.agreed(given))

    def agreed(self, given: dict):
        """The one value of all these keys."""
        values = list(given.values())
        require(values.count(values[0]) == len(values), f"{self.path} contradicts itself: {given}")
        return values[0]

    def require_plain(self, others: dict[str, list]):
        """ValueError for a key that would change the result: of NEUTRAL, ROPE, or these others."""
        neutral = NEUTRAL | others | {"rope_scaling": [], "rope_parameters": []}
        for inner, values in ROPE.items():
            neutral |= {f"{key}.{inner}": values for key in ("rope_scaling", "rope_parameters")}
        for key, values in neutral.items():
            value = self.raw.get(key)
            expected = f"we only compute {(values or [None])[0]!r:.60}"
            plain = value in (None, {}, *values)
            require(plain, f"{self.path}: {key} is {value!r:.80}; {expected}")

    def dtype(self) -> str:
        """The numbers that the weights are saved in, by a name of torch."""
        given = {key: self.raw[key] for key in ("dtype", "torch_dtype") if key in self.raw}
        given = {key: str(value).removeprefix("torch.") for key, value in given.items()}
        return self.agreed(given) if given else "float32"

    def within_window(self, context: int) -> int:
        """The context, cut to the window of attention: up to there both see the same tokens."""
        window = self.get(int, "sliding_window", default=context, high=2**30)
        if window >= context:
            return context
        note(f"{self.path}: attention looks back {window:,} tokens: the context is cut to that")
        return window


# ------------------------------------------------------------------ config.json and a model's sizes

# Field of MoEConfig -> its kind, and the keys that may hold it; the names differ by version.
KEYS = {
    "vocab_size": (int, "vocab_size"),
    "context": (int, "max_position_embeddings"),
    "d_model": (int, "hidden_size"),
    "clip_qkv": (float, "clip_qkv"),
    "n_layers": (int, "num_hidden_layers"),
    "n_heads": (int, "num_attention_heads"),
    "n_kv_heads": (int, "num_key_value_heads"),
    "n_experts": (int, "num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": (int, "num_experts_per_tok"),
    "norm_topk": (bool, "norm_topk_prob"),
    "norm_eps": (float, "rms_norm_eps"),
    "tied": (bool, "tie_word_embeddings"),
    "head_dim": (int, "head_dim"),
    "rope_theta": (float, "rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"),
}
OPTIONAL = {
    "n_kv_heads": None,
    "head_dim": None,
    "clip_qkv": None,
    "norm_topk": False,
    "tied": False,
}
TRAINING = ("dropout", "residual_init")  # fields of MoEConfig that a trained model does not need
HIGH = {"n_layers": 256, "context": 2**30}


def read_config(raw: dict, path):
    """What config.json says -> (family, MoEConfig, dtype of the file).

    path: for messages. ValueError that names a key which is missing, absurd, or would change the
    result in a way that moe.py does not compute.
    """
    name = str(raw.get("model_type"))
    names = ", ".join(FAMILIES)
    hint = "; a run of train_toy.py is opened by eval.py" if "model_type" not in raw else ""
    require(name in FAMILIES, f"{path}: model_type is {name:.60}; known are {names}{hint}")
    settings = Settings(raw, path)

    # Read the sizes that every family has.
    family = FAMILIES[name]
    defaults = OPTIONAL | {"rope_theta": family.rope_theta}
    sizes = {"qk_norm": family.qk_norm}
    for field, (kind, *keys) in KEYS.items():
        limits = {"high": HIGH.get(field)}
        if field in defaults:
            limits["default"] = defaults[field]
        sizes[field] = settings.get(kind, *keys, **limits)

    # Refuse what we would compute wrongly.
    others = {"layer_types": [["full_attention"] * sizes["n_layers"]]}
    if name != "olmoe":  # only this family clips
        others["clip_qkv"] = []
    settings.require_plain(others)

    # Mixtral always looks within its window, others where they are told, OLMoE by default.
    told = settings.get(bool, "use_sliding_window", default=name != "qwen3_moe")
    if told or name == "mixtral":
        sizes["context"] = settings.within_window(sizes["context"])

    # Find the dense layers, and the widths.
    sizes["dense_layers"] = dense_layers(settings, sizes["n_layers"])
    n_shared = settings.get(int, "n_shared_experts", default=0, low=0)
    width = settings.get(int, "moe_intermediate_size", default=None)
    sizes["d_expert"] = width or settings.get(int, "intermediate_size")
    sizes["d_dense"] = settings.get(int, "intermediate_size", default=None)
    sizes["d_shared"] = n_shared * sizes["d_expert"]

    # Mixtral always divides the k weights by their sum. DeepSeek never divides a single one.
    if name == "mixtral":
        sizes["norm_topk"] = True
    if name == "deepseek" and sizes["top_k"] == 1:
        sizes["norm_topk"] = False

    try:
        config = MoEConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return name, config, settings.dtype()


def dense_layers(settings: Settings, n_layers: int) -> list[int]:
    """The layers that are dense; families say it in different keys."""
    every = settings.get(int, "moe_layer_freq", default=1)
    step = settings.get(int, "decoder_sparse_step", default=1)
    first = settings.get(int, "first_k_dense_replace", default=0, low=0)
    named = settings.raw.get("mlp_only_layers", [])
    valid = isinstance(named, list) and all(layer in range(n_layers) for layer in named)
    problem = f"{settings.path}: mlp_only_layers is {named!r:.60}"
    require(valid, f"{problem}; expected some of the layers 0 to {n_layers - 1}")

    layers = []
    for i in range(n_layers):
        moe = i % every == 0 and (i + 1) % step == 0
        if i < first or i in named or not moe:
            layers.append(i)
    return layers


def write_config(model):
    """The family that a model belongs to, and its config.json -> (family, dict).

    ValueError, with the reason, where no family can express it.
    """
    model = unwrapped(model)

    # A router or expert of another class computes what no family does.
    classes = {type(model)}
    for module in model.modules():
        if isinstance(module, MoE):
            classes |= {type(module.router), type(module.experts)}
    other = sorted(kind.__name__ for kind in classes - {MoETransformer, Router, Experts})
    require(not other, f"no family of the hub computes {', '.join(other)}")

    # The norm of queries and keys tells the families apart, but for two.
    c = model.config
    mixtral = c.norm_topk and c.d_shared == 0 and not c.dense_layers
    unnormed = "mixtral" if mixtral else "deepseek"
    name = {"full": "olmoe", "head": "qwen3_moe", "none": unnormed}[c.qk_norm]

    # Write what all families have, and what only this one has.
    raw = {}
    for field, (_, key, *_) in KEYS.items():
        if field not in ("clip_qkv", "head_dim"):
            raw[key] = getattr(c, field)
    raw["intermediate_size"] = c.d_expert
    if name == "olmoe":
        raw["clip_qkv"] = c.clip_qkv
    if name == "mixtral":
        raw["head_dim"] = c.head_dim
        raw["num_local_experts"] = c.n_experts
    if name == "qwen3_moe":
        raw["head_dim"] = c.head_dim
        raw["mlp_only_layers"] = list(c.dense_layers)
    if name == "deepseek":
        raw["n_routed_experts"] = c.n_experts
        raw["n_shared_experts"] = c.d_shared // c.d_expert
        raw["first_k_dense_replace"] = len(c.dense_layers)
    if name in ("qwen3_moe", "deepseek"):
        raw["intermediate_size"] = c.d_dense
        raw["moe_intermediate_size"] = c.d_expert
    class_name = name.title().replace("_", "")  # qwen3_moe -> Qwen3Moe
    raw |= {
        "model_type": name,
        "architectures": [f"{class_name}ForCausalLM"],
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }

    # Read it back: what differs cannot be expressed. What only training reads is left out, and
    # without dense layers their width means nothing.
    _, back, _ = read_config(raw, "config.json")
    lost = {}
    for field, value in vars(c).items():
        unused = field in TRAINING or (field == "d_dense" and not c.dense_layers)
        if not unused and getattr(back, field) != value:
            lost[field] = value
    problem = f"with qk_norm {c.qk_norm!r} this would be {name}, which cannot have {lost}"
    require(not lost, problem)
    return name, raw
