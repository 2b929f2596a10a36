"""What is compared with what: 16 presets, of equal parameters where that is meant.

Three of them are in cartesian.py, which also has the sizes to start from. `python -m
lab.composing.presets` counts the parameters of all, at the toy's sizes and at the paper's.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.nothing, __doc__)

from dataclasses import replace

from cartesian import (
    PAPER,
    TOY,
    CartesianConfig,
    CartesianTransformer,
    cartesian,
    count_parameters,
    fine_grained,
    smoe_share,
)
from lab.composing.layers import ComposedConfig, ComposedTransformer
from moe import MoEConfig, MoETransformer, Router, require

MODELS = {
    MoEConfig: MoETransformer,
    CartesianConfig: CartesianTransformer,
    ComposedConfig: ComposedTransformer,
}


def config_class(sizes: dict) -> type[MoEConfig]:
    """The class of a config that was saved as a dict, such as in a run's config.json."""
    if "layer" in sizes:
        return ComposedConfig
    if "n_sublayers" in sizes:
        return CartesianConfig
    return MoEConfig


def build_model(sizes: dict, router: type[Router] = Router) -> MoETransformer:
    """The model of a config as a dict. ValueError or TypeError: it is none of ours."""
    config = config_class(sizes)(**sizes)
    return MODELS[type(config)](config, router)


# ---- presets


def composed(base: MoEConfig, layer: str = "moe", **changes) -> ComposedConfig:
    """The base sizes, some of them changed, with another layer or router."""
    sizes = vars(base) | {"layer": layer} | changes
    sizes.pop("n_sublayers", None)
    return ComposedConfig(**sizes)


def without_shared(base: MoEConfig) -> MoEConfig:
    """One more expert, and one more visit, instead of the shared expert."""
    return replace(base, n_experts=base.n_experts + 1, top_k=base.top_k + 1, d_shared=0)


def dense(base):
    """One dense layer, as wide as what a token visits elsewhere."""
    return composed(base, router="none", d_shared=base.top_k * base.d_expert + base.d_shared)


def dense_two(base):
    """The same in two dense layers, one after the other: a control of depth."""
    width = base.top_k * base.d_expert + base.d_shared
    return composed(base, "cartesian", router="none", d_shared=width // 2)


def dense_paper(base):
    """The paper's dense row, as wide as one expert: not matched."""
    return composed(base, router="none", d_shared=base.d_expert)


def smoe_top3(base):
    """One more visit instead of the shared expert, and experts 17/16 as wide at 16 experts."""
    width = base.d_expert + base.d_shared / base.n_experts
    return composed(base, top_k=base.top_k + 1, d_expert=8 * round(width / 8), d_shared=0)


def hash_layer(base):
    """Experts that are fixed by the token's id."""
    return composed(base, router="hash")


def top_p(base):
    """As many experts as reach a probability of 0.4 together."""
    return composed(base, router="top_p")


def fine_grained_no_shared(base):
    """Fine-grained experts without a shared one."""
    return fine_grained(without_shared(base))


def cartesian_no_shared(base):
    """Cartesian sub-layers without shared experts."""
    return cartesian(without_shared(base))


def cartesian_parallel(base):
    """The experts of `cartesian` side by side: nothing is composed."""
    return composed(cartesian(base), "parallel")


def cartesian_chain(base):
    """The other residual: what A adds is read by B, but not kept."""
    return composed(cartesian(base), "chain")


def cartesian_pairs(base):
    """The literal product: each chosen A_i alone through each chosen B_j."""
    return composed(cartesian(base), "pairs")


def cartesian_k1(base):
    """One visit in each sub-layer, to wider experts."""
    return cartesian(base, n_visits=1)


def cartesian_k4(base):
    """Four visits in each sub-layer, to narrower experts."""
    return cartesian(base, n_visits=4)


PRESETS = {
    "dense": dense,
    "dense_two": dense_two,
    "dense_paper": dense_paper,
    "smoe_share": smoe_share,
    "smoe_top3": smoe_top3,
    "hash": hash_layer,
    "top_p": top_p,
    "fine_grained": fine_grained,
    "fine_grained_no_shared": fine_grained_no_shared,
    "cartesian": cartesian,
    "cartesian_no_shared": cartesian_no_shared,
    "cartesian_parallel": cartesian_parallel,
    "cartesian_chain": cartesian_chain,
    "cartesian_pairs": cartesian_pairs,
    "cartesian_k1": cartesian_k1,
    "cartesian_k4": cartesian_k4,
}
# Presets that are not meant to have as many parameters as fine_grained, in all or activated.
OTHER_TOTAL = {"dense", "dense_two", "dense_paper"}
OTHER_ACTIVATED = {"dense_paper", "smoe_top3", "top_p"}


def preset(name: str, base: MoEConfig) -> MoEConfig:
    """The config of a preset at these base sizes.

    ValueError: there is no such preset, or at these sizes it cannot have the parameters of
    fine_grained, to 1 % and the routers that it lacks, where it is meant to.
    """
    # Make its config, and compare it with fine_grained.
    require(name in PRESETS, f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    sizes = f"n_experts {base.n_experts}, d_expert {base.d_expert}, d_shared {base.d_shared}"
    hint = "try d_expert equal to d_shared, both larger, and n_experts a multiple of top_k"
    try:
        config = PRESETS[name](base)
        more_total, more_activated = against_fine_grained(config, base)
    except ValueError as error:  # experts without width, or fewer than a token visits
        raise ValueError(f"{name} is impossible at {sizes}: {error}; {hint}") from None

    # Where it is meant to be as large, it has to be.
    matched_total = name in OTHER_TOTAL or abs(more_total) < 0.01
    least = -0.01 - routers_share(base)  # fewer routers, or none, are no fault
    matched_activated = name in OTHER_ACTIVATED or least < more_activated < 0.01
    require(
        matched_total and matched_activated,
        f"{name} has {more_total:+.1%} parameters, {more_activated:+.1%} activated, against "
        f"fine_grained at {sizes}; expected within 1 %; {hint}",
    )
    return config


def against_fine_grained(config: MoEConfig, base: MoEConfig) -> tuple[float, float]:
    """How many more parameters a config has than fine_grained, in all and activated: shares."""
    total, activated = count_both(config)
    fine_total, fine_activated = count_both(fine_grained(base))
    return total / fine_total - 1, activated / fine_activated - 1


def routers_share(base: MoEConfig) -> float:
    """The share of fine_grained's activated parameters that are its routers'."""
    config = fine_grained(base)
    _, activated = count_both(config)
    return config.n_layers * config.n_experts * config.d_model / activated


def count_both(config: MoEConfig) -> tuple[int, int]:
    """Parameters in all, and activated (with the router top_p: at most), of any config of ours."""
    return count_parameters(config, MODELS[type(config)])


def main(argv) -> int:
    """Print the parameters of all presets, at the toy's sizes and at the paper's."""
    for sizes in (TOY, PAPER):
        base = MoEConfig(**sizes)
        title = f"{base.n_layers} layers of width {base.d_model}"
        print(f"\n{title:24}{'parameters':>14}{'activated':>14}")
        for name in PRESETS:
            print(count_line(name, base))
    return 0


def count_line(name: str, base: MoEConfig) -> str:
    """A line with the parameters of a preset, and by how much the activated ones differ."""
    config = preset(name, base)
    total, activated = count_both(config)
    line = f"{name:24}{total:14,}{activated:14,}"
    if name == "top_p":
        return f"{line}  at most: it depends on the data"
    _, more = against_fine_grained(config, base)
    if abs(more) > 0.01:
        return f"{line}  {more:+.1%} against fine_grained"
    return line


if __name__ == "__main__":
    cli.program(main)
