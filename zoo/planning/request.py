"""Requests: checks what the user asks for, and makes a plan for a network's channel groups."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Real
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from zoo.criteria.scores import CRITERIA, channel_scores, labelled_batches
from zoo.criteria.weight_scores import Scores
from zoo.errors import FactorError, GraphError, ZooError, integer, unknown
from zoo.models import architecture
from zoo.planning.best import BEST, best_policies, best_profile, reason
from zoo.planning.borrowed import borrowed
from zoo.planning.decisions import Decisions
from zoo.planning.latency import Clock, latency_table
from zoo.planning.learned import LEARNED, learned_policy, play
from zoo.planning.policies import POLICIES, policy_solution
from zoo.planning.rankings import RANKINGS, ranking_solution
from zoo.planning.solver import Limits, round_widths, scale_curve, solve
from zoo.registry.store import find_profile, get_profile, is_registry, pinned, untagged
from zoo.spec.cost import CostModel, LatencyTable, cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, make_plan
from zoo.spec.profile import METRICS, Profile

__all__ = ["Request", "plan_of", "planned", "request"]


@dataclass(frozen=True)
class Request:
    """A checked request: `name` of the profile or policy, and the profile if it is one.

    `align` is None for the step of the runtime that the network is for, and 1 without one. `best`
    says that `best` was asked for, and `name` is what it stands for. `arch` is "" for a network
    that has no name.
    """

    name: str
    profile: Profile | None
    cf: float
    metric: str
    criterion: str
    seed: int
    align: int | None
    floor: float
    keep: Mapping[str, float]
    refit: bool
    best: bool = False
    arch: str = ""

    @property
    def learned(self) -> bool:
        """Whether it asks for a learned policy, bundled or not."""
        return self.profile is None and self.name.partition(":")[0] == LEARNED


def request(
    profile: str | Profile,
    arch: str = "",
    *,
    cf: float | None = None,
    metric: str = "params",
    criterion: str = "random",
    seed: int = 0,
    align: int | None = None,
    floor: float = 0.0,
    keep: Mapping[str, float] | None = None,
    refit: bool = False,
    data: bool = False,
) -> Request:
    """Check the arguments of a request and resolve its profile, without reading any weights.

    The arguments are those of `zoo.load`; `arch` is "" for a network that has no name, and `data`
    is whether there are images to score channels with.

    Raises:
        ZooError: for an invalid name or number; the message gives the valid ones.
        FactorError: for a factor without a profile, or another than the given profile's.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    if not isinstance(keep, Mapping | None) or not all(
        isinstance(name, str) for name in keep or ()
    ):
        raise ZooError(f"keep={keep!r}: a dict from module names to keep ratios is needed.")
    seed, align = integer("seed", seed), None if align is None else integer("align", align, 1)
    if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 <= floor <= 1:
        raise ZooError(f"floor={floor!r}: the least keep ratio of a group must be in [0, 1].")
    if cf is not None:
        cf = _factor(cf)
    name, resolved = _resolved(profile, arch, cf, metric, data)
    if resolved is not None:
        if cf is None:
            if metric not in ("params", resolved.metric):  # params is what nobody asked for
                _check_verbatim(name, resolved, arch, resolved.cf, metric)
            cf, metric = resolved.cf, resolved.metric
        limited = align not in (None, 1) or bool(floor) or bool(keep)
        own = borrowed(resolved, arch) if arch else None
        refit = refit or (profile == BEST and limited) or own is not None
        resolved = own or resolved
        if not refit:
            _check_verbatim(name, resolved, arch, cf, metric)
            if limited:
                raise ZooError(
                    f"The profile {name} is applied verbatim; align=, floor= and keep= need a "
                    f"policy{', or refit=True' if arch else ''}."
                )
    if cf is None:
        raise FactorError(f"{name!r} needs a compression factor: pass cf=.")
    pins = dict(keep or {})
    return Request(
        name, resolved, cf, metric, criterion, seed, align, float(floor), pins, refit,
        best=profile == BEST, arch=arch,
    )  # fmt: skip


def _resolved(
    profile: str | Profile, arch: str, cf: float | None, metric: str, data: bool
) -> tuple[str, Profile | None]:
    """(name, profile); None where the name is that of a policy.

    Raises:
        ZooError: for a name that means nothing, with those that do.
        FactorError: for a factor without a profile, or a profile of another architecture.
    """
    if isinstance(profile, Profile):
        name, found = f"{profile.architecture}/{profile.name}", profile
    elif not isinstance(profile, str):
        raise ZooError(
            f"A profile is a name, a reference such as 'file:<path>', or a Profile; "
            f"got {profile!r}."
        )
    elif profile in POLICIES or profile in RANKINGS:
        return profile, None
    elif profile == BEST:
        return best_profile(arch, cf, metric, data=data) or (profile, None)
    elif profile.partition(":")[0] == LEARNED:
        learned_policy(profile)  # a policy that cannot be read is refused before the weights are
        return profile, None
    elif profile == "searched" and arch:
        if cf is None:
            return profile, None
        name, found = find_profile(arch, cf, metric)
    elif arch and is_registry(profile):
        if cf is None:
            raise FactorError(f"{profile!r} has several profiles: pass cf=.")
        name, found = find_profile(arch, cf, metric, profile)
    elif profile == "searched":
        raise ZooError(
            "'searched' is the profile of an architecture, which zoo.load is given; for a live "
            "network give the profile's reference, such as 'bundled:resnet20-16/params-cf4'."
        )
    elif ":" in profile or "/" in profile or profile.endswith(".json"):
        name = pinned(profile)
        found = get_profile(name)
    else:
        sources = ("bundled:...", "published:...", "file:...", "hf:...")
        known = [BEST, *(["searched"] if arch else [])]
        choices = [*known, *POLICIES, *RANKINGS, LEARNED, f"{LEARNED}:...", *sources]
        raise unknown("profile", profile, choices)
    if arch and found.architecture not in (untagged(arch), architecture(arch).profiles_from):
        raise FactorError(f"The profile {name} is for {found.architecture}, not {arch}.")
    return name, found


def _check_verbatim(name: str, profile: Profile, arch: str, cf: float, metric: str) -> None:
    """Refuse another factor than the profile's."""
    if (cf, metric) != (profile.cf, profile.metric):
        rescale = ", or refit=True to rescale it" if arch else ""
        raise FactorError(
            f"The profile {name} is for {profile.cf:g}x {profile.metric}, not {cf:g}x "
            f"{metric}: pass cf={profile.cf:g}, metric={profile.metric!r}{rescale}."
        )


def _factor(cf: float) -> float:
    if isinstance(cf, bool) or not isinstance(cf, Real) or not math.isfinite(cf) or cf < 1:
        raise FactorError(f"A compression factor is a finite number of at least 1, got {cf!r}.")
    return float(cf)


def planned(
    module: nn.Module,
    groups: ChannelGroups,
    request: Request,
    data: Dataset[Any] | DataLoader[Any] | None,
    clock: Clock | None = None,
) -> Plan:
    """The plan for `request` on these groups of `module`: first widths, then channels.

    Latency is measured by `clock`, which by default is PyTorch's on the device of `module`, or read
    from the cache. Where the request leaves `align` open, widths are multiples of the clock's step.

    Raises:
        ZooError: when the policy or the criterion needs data and there is none.
        FactorError: when the factor is out of reach; the message says what stays whole and why.
        GraphError: when the profile's groups, or those in `keep`, are not the network's.
    """
    if request.name == BEST:
        return _best(module, groups, request, data, clock)
    ranking = RANKINGS.get(request.name) if request.profile is None else None
    if request.learned and data is not None:
        ranking = learned_policy(request.name).ranking(request.metric)
    if ranking is not None and CRITERIA[ranking.criterion].needs_data and data is None:
        raise ZooError(
            f"The policy {request.name!r} ranks channels by {ranking.criterion!r}, which needs "
            f"data: pass data=, a Dataset or DataLoader."
        )
    if ranking is not None and any(parameter.is_meta for parameter in module.parameters()):
        raise GraphError(
            f"The policy {request.name!r} ranks channels by their weights, of which a network on "
            f"the meta device has none."
        )
    latency = latency_table(module, groups, clock) if request.metric == "latency" else None
    model = cost_model(groups, latency)
    chosen = request.profile is None or request.refit  # and not applied verbatim
    step = clock.step if clock is not None and request.align is None and chosen else 1
    limits, whole = _limits(groups, request, request.align or step)
    groups = replace(groups, unprunable={**groups.unprunable, **whole})
    device = next(module.parameters()).device
    batches = None if data is None else labelled_batches(data, device, request.seed)

    def scores_by(criterion: str) -> Scores:
        return channel_scores(criterion, module, groups, request.seed, batches)

    try:
        widths = _widths(model, groups, request, limits, scores_by, data is not None)
    except FactorError as error:
        bound = " keep= or floor= bound the widths." if request.keep or request.floor else ""
        raise FactorError(f"{error}{bound}{_stays_whole(groups.unprunable)}") from None
    if request.learned and data is None:
        request = replace(request, name=f"{request.name}, no data")
    plan = plan_of(request, groups, widths, scores_by(request.criterion), latency)
    log = logging.getLogger("zoo")
    if request.best and log.isEnabledFor(logging.INFO):
        told = reason(
            plan.profile, plan.metric, plan.asked, data=data is not None, arch=request.arch
        )
        log.info(told)
    return plan


def _best(
    module: nn.Module,
    groups: ChannelGroups,
    request: Request,
    data: Dataset[Any] | DataLoader[Any] | None,
    clock: Clock | None,
) -> Plan:
    """The plan of the first of the best policies that works here and reaches the factor."""
    *first, last = best_policies(
        request.metric, request.cf, data=data is not None, arch=request.arch
    )
    for name in first:
        with suppress(FactorError, GraphError):
            return planned(module, groups, replace(request, name=name), data, clock)
    return planned(module, groups, replace(request, name=last), data, clock)


def _stays_whole(unprunable: Mapping[str, str], most: int = 5) -> str:
    """A sentence on the first `most` modules that are not pruned, and why; "" if all are."""
    if not unprunable:
        return ""
    reasons = [f"{name!r} ({reason})" for name, reason in islice(unprunable.items(), most)]
    more = len(unprunable) - len(reasons)
    return f" Not pruned: {', '.join(reasons)}{f' and {more} more' if more else ''}."


def _widths(
    model: CostModel,
    groups: ChannelGroups,
    request: Request,
    limits: Limits,
    scores_by: Callable[[str], Scores],
    data: bool,
) -> Mapping[str, int]:
    """Group name -> width, by the request's policy or profile."""
    profile, names = request.profile, groups.names
    if profile is None and request.name in RANKINGS:
        ranking = RANKINGS[request.name]
        scores = scores_by(ranking.criterion)
        solved = ranking_solution(ranking, scores, model, request.cf, request.metric, limits)
    elif request.learned:
        policy = learned_policy(request.name)
        ranking = policy.ranking(request.metric)
        decisions = Decisions(
            groups, model, request.cf, request.metric, limits=limits, ranking=ranking,
            scores=scores_by(ranking.criterion) if data else None,
        )  # fmt: skip
        solved = play(policy, decisions)
    elif profile is None:
        solved = policy_solution(
            request.name, model, request.cf, request.metric, request.seed, limits
        )
    elif request.refit and set(profile.kept) == set(names):
        curve = scale_curve([profile.keep_ratios[name] for name in names], floor=1e-3)
        solved = solve(model, curve, request.cf, request.metric, limits)
    else:
        _check_sizes(request.name, profile, dict(zip(names, model.sizes, strict=True)))
        return profile.kept
    return dict(zip(names, solved.widths, strict=True))


def _check_sizes(name: str, profile: Profile, sizes: Mapping[str, int]) -> None:
    """Refuse the published counts of a network whose layers have the same names and other sizes."""
    if profile.published is None:
        return
    for group, kept in profile.kept.items():
        size = round(kept / profile.keep_ratios[group])
        if sizes.get(group, size) != size:
            raise GraphError(
                f"The profile {name} is for {profile.architecture}, whose {group!r} has {size} "
                f"channels; this network's has {sizes[group]}."
            )


def plan_of(
    request: Request,
    groups: ChannelGroups,
    widths: Mapping[str, int],
    scores: Scores,
    latency: LatencyTable | None = None,
) -> Plan:
    """The plan that keeps the highest-scored channels at these widths, and records the request."""
    return make_plan(
        groups,
        widths,
        scores,
        profile=request.name,
        metric=request.metric,
        asked=request.cf,
        criterion=request.criterion,
        seed=request.seed,
        latency=latency,
    )


def _limits(groups: ChannelGroups, request: Request, align: int) -> tuple[Limits, dict[str, str]]:
    """The limits on widths, and the groups that they leave whole, with the reason."""
    pinned = _pins(groups, request.keep)
    whole = {
        group.name: f"has {group.size} channels, no more than align={align}"
        for index, group in enumerate(groups.groups)
        if align > 1 and group.size <= align and index not in pinned
    }
    return Limits(align, pinned, request.floor), whole


def _pins(groups: ChannelGroups, keep: Mapping[str, float]) -> dict[int, int]:
    """Index -> width of the groups that `keep` names, themselves or a layer that is cut with them.

    A group's own name comes first: `{"layer1": 1.0, "conv1": 0.5}` halves the outputs of `conv1`,
    although those of `layer1` are added to them.
    """
    for name, ratio in keep.items():
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:
            raise ZooError(f"keep={{{name!r}: {ratio!r}}}: a keep ratio must be in (0, 1].")
    pinned, used = dict[int, int](), set[str]()
    for index, group in enumerate(groups.groups):
        layers = [weight.removesuffix(".weight") for weight in group.filters]
        for names in ([group.name], [group.name.partition("[")[0]], layers):
            by = [key for key in keep if any(f"{name}.".startswith(f"{key}.") for name in names)]
            used.update(by)
            if by and index not in pinned:
                widths = [round_widths([group.size], [float(keep[key])])[0] for key in by]
                if len(set(widths)) > 1:
                    raise ZooError(f"keep= pins {group.name!r} twice, by {by[0]!r} and {by[1]!r}.")
                pinned[index] = widths[0]
    for key in keep:
        if key not in used:
            raise unknown("channel group to keep", key, groups.names, GraphError)
    return pinned
