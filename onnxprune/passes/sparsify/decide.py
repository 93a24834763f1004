"""From a configuration to thresholds: which weights belong together, and how far each goes down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from onnxprune.contracts import CanonicalModel, Iteration
from onnxprune.errors import PassError, UsageError, quoted_list
from onnxprune.graph.scope import first_match, matches_scope, require_scopes
from onnxprune.graph.weights import constant_array, iter_windows
from onnxprune.passes.sparsify.config import ScopeRule, SparsifyConfig
from onnxprune.passes.sparsify.patterns import NOfM, Pattern, Unit, Unstructured, unit_keys, window_keys
from onnxprune.passes.sparsify.plan import SparsifyPlan, TensorPlan
from onnxprune.passes.sparsify.select import Keys, NonFiniteScoreError, select_smallest
from onnxprune.passes.sparsify.sites import WeightSite, find_weights

__all__ = ["WINDOW_BYTES", "decide"]

# A window and the few arrays made from it stay in a core's second-level cache.
WINDOW_BYTES = 1 << 20

# From here on a sample of one weight in 16 is large enough, and reading all of them once more takes noticeable time.
SAMPLED_FROM_WEIGHTS = 4_000_000
SAMPLED_SHARE = 16

DEFAULT_GROUP = "default"


def decide(model: CanonicalModel, config: SparsifyConfig, iteration: Iteration | None = None) -> SparsifyPlan:
    """Thresholds for all weights that `config` reaches; inside a repeated block, for the sparsities due by now.

    Raises:
        PassError: A weight holds NaN or infinite values.
        UsageError: A rule matches no weight, or a skip pattern means nothing in the model.
    """
    found = find_weights(model)
    pattern = config.parsed_pattern
    require_scopes(model, config.skip, of="`skip` of pass 'sparsify'")
    _check_rules(config, found.sites)
    skipped = dict(found.refused)
    groups: dict[str, list[WeightSite]] = {}
    levels: dict[str, float] = {}
    for site in found.sites:
        reason = _reason_to_skip(site, pattern, config)
        if reason:
            skipped[site.name] = reason
            continue
        group, level = _level(site, config)
        level = level if iteration is None else iteration.ratio_by_now(level)
        if level == 0.0:
            skipped[site.name] = f"its sparsity is 0 ({group})"
            continue
        key = group if config.scope == "global" else f"{group}/{site.name}"
        groups.setdefault(key, []).append(site)
        levels[key] = level

    decided: dict[str, TensorPlan] = {}
    for key, sites in groups.items():
        for plan in _decide_group(sites, pattern, group=key.partition("/")[0], level=levels[key]):
            decided[plan.tensor] = plan
    in_graph_order = tuple(decided[site.name] for site in found.sites if site.name in decided)
    return SparsifyPlan(pattern=config.pattern, tensors=in_graph_order, skipped=skipped)


def _keys_of_site(site: WeightSite, pattern: Pattern, share: int) -> Iterator[Keys]:
    """Keys of all units of one weight in index order, in windows; of single weights one in `share`."""
    if isinstance(pattern, Unstructured):
        for window in iter_windows(site.value, WINDOW_BYTES):
            yield window_keys(window.array[: -(-window.array.size // share)])
        return
    array = constant_array(site.value)
    if array is not None:
        yield unit_keys(pattern, array, site.axes)


def _decide_group(sites: Sequence[WeightSite], pattern: Pattern, *, group: str, level: float) -> Iterator[TensorPlan]:
    streams = [partial(_keys_of_site, site, pattern) for site in sites]
    try:
        is_large = sum(site.size for site in sites) >= SAMPLED_FROM_WEIGHTS
        selection = select_smallest(streams, level, sampled_share=SAMPLED_SHARE if is_large else 1)
    except NonFiniteScoreError as error:
        raise PassError(
            f"Cannot sparsify {sites[error.stream].describe()}: it holds NaN or infinite values, which have no rank.",
            f"Repair the model, or exclude the weight with `skip = ['{sites[error.stream].name}']`.",
        ) from error
    for site, stream in zip(sites, selection.streams, strict=True):
        yield TensorPlan(
            tensor=site.name,
            group=group,
            sparsity=level,
            threshold=selection.threshold,
            ties=stream.ties,
            units=stream.units,
            zeroed=stream.chosen,
            zero_before=stream.zeros,
        )


def _level(site: WeightSite, config: SparsifyConfig) -> tuple[str, float]:
    """The group and sparsity of a weight. One that several nodes share takes the lowest sparsity among them."""
    candidates = []
    for position in range(len(site.nodes)):
        for index, rule in enumerate(config.rules):
            if _rule_matches(rule, site, position):
                candidates.append((rule.sparsity, f"rules[{index}]"))
                break
        else:
            candidates.append((config.default_sparsity, DEFAULT_GROUP))
    level, group = min(candidates)
    return group, level


def _rule_matches(rule: ScopeRule, site: WeightSite, position: int) -> bool:
    node = site.nodes[position]
    return (
        (rule.name is None or matches_scope(rule.name, site.name, node.name))
        and (rule.op_type is None or rule.op_type == node.op_type)
        and (rule.module is None or matches_scope(rule.module, module_paths=(site.module_path(position),)))
    )


def _reason_to_skip(site: WeightSite, pattern: Pattern, config: SparsifyConfig) -> str:
    names = (site.name, *(node.name for node in site.nodes))
    if glob := first_match(config.skip, *names, module_paths=site.module_paths):
        return f"excluded by skip '{glob}'"
    if isinstance(pattern, Unstructured):
        return ""
    if not site.axes_agree:
        return "several nodes read it with different output axes, so it has no units of its own"
    num_inputs = site.shape[site.axes.in_axis]
    if isinstance(pattern, NOfM) and num_inputs <= pattern.keep:
        return f"it has {num_inputs} inputs in each group, and pattern '{config.pattern}' keeps {pattern.keep} of them"
    if isinstance(pattern, Unit) and site.mixes_units:
        return "its output axis mixes several units (recurrence gates or groups)"
    return ""


def _check_rules(config: SparsifyConfig, sites: Sequence[WeightSite]) -> None:
    """A rule that matches nothing is a misspelt one, or asks for a combination that the model doesn't have."""
    for index, rule in enumerate(config.rules):
        if not any(_rule_matches(rule, site, position) for site in sites for position in range(len(site.nodes))):
            selectors = rule.model_dump(exclude={"sparsity"}, exclude_none=True)
            given = ", ".join(f"{key} = '{value}'" for key, value in selectors.items())
            raise UsageError(f"Rule rules[{index}] of pass 'sparsify' ({given}) matches no weight.", _known(sites))


def _known(sites: Sequence[WeightSite]) -> str:
    modules = sorted({path.partition(".")[0] for site in sites for path in site.module_paths})
    weights = f"Weights are {quoted_list(site.name for site in sites)}"
    return f"{weights}; modules are {quoted_list(modules)}." if modules else f"{weights}."
