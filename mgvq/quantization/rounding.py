"""From chosen rates to stored weights: tables fitted, codes chosen, tables refitted; and the proxy error after each of these."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.compensation.none import NoCompensation
from mgvq.formats.grouped import GroupedWeight
from mgvq.formats.outliers import OutlierWeight
from mgvq.progress import progress
from mgvq.protocols import CodedSlice, Compensation, FitsTargets, FittedSlice, QuantizedWeight, Refit
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.limits import Limit, Limits
from mgvq.quantization.table_groups import TableGroup
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.types import LayerProblem, Metric, Rate, Site


@dataclass(frozen=True)
class Rounded:
    """Layers after rounding, by site."""

    stored: dict[Site, QuantizedWeight] = field(default_factory=dict)
    decoded: dict[Site, Float[Tensor, "_ _"]] = field(default_factory=dict)  # in the model's own basis, where kept (`weight`)
    proxy: dict[Site, dict[str, float]] = field(default_factory=dict)  # the proxy error after each step of `LayerRounder.round`
    limits: dict[Site, Limit] = field(default_factory=dict)  # how near they come to what no code can do better

    def __or__(self, later: "Rounded") -> "Rounded":
        """Both; of layers that both have, what is later."""
        return Rounded(
            self.stored | later.stored, self.decoded | later.decoded, self.proxy | later.proxy, self.limits | later.limits
        )

    def packed(self) -> "Rounded":
        """The same without decoded weights, for models whose layers do not fit into memory together."""
        return replace(self, decoded={})

    def weight(self, site: Site) -> Float[Tensor, "_ _"]:
        """What a layer stands for in the model's own basis, float32; decoded anew where it is not kept."""
        return self.decoded[site] if site in self.decoded else self.stored[site].decode()


@dataclass(frozen=True)
class _Coded:
    """A layer's fitted slices in the order of their groups, and the codes of each."""

    slices: list[FittedSlice]
    codes: list[Tensor]

    def weights(self) -> tuple[QuantizedWeight, ...]:
        return tuple(fitted.codebook.weight(codes) for fitted, codes in zip(self.slices, self.codes, strict=True))

    def decode(self, like: Tensor) -> Float[Tensor, "out in"]:
        values = like.new_empty(like.shape).float()
        for fitted, codes in zip(self.slices, self.codes, strict=True):
            values[:, fitted.channel_slice.columns.to(like.device).long()] = fitted.codebook.weight(codes).decode()
        return values


@dataclass(frozen=True)
class _Errors:
    """How far layers are from their weights."""

    proxy: dict[Site, dict[str, float]] = field(default_factory=dict)
    limits: dict[Site, Limit] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """Layers that share tables, rounded."""

    problems: Mapping[Site, LayerProblem]
    steps: Mapping[str, Callable[[], Mapping[Site, _Coded]]]  # of the rounding, in order, and what they leave
    flags: Sequence[str]

    def layers(self) -> dict[Site, tuple[tuple[QuantizedWeight, ...], Tensor]]:
        """The stored weights of each layer's channel groups, and what they stand for in the model's own basis."""
        coded = list(self.steps.values())[-1]()
        return {
            site: (coded[site].weights(), problem.in_own_basis(coded[site].decode(problem.target)))
            for site, problem in self.problems.items()
        }

    def errors(self, limits: Limits | None) -> _Errors:
        """Proxy errors after every step, and limits where they are asked for."""
        found, coded = _Errors({site: {} for site in self.problems}), dict[Site, _Coded]()
        whole = {site: max(p.metric.loss(p.whole()), 1e-30) for site, p in self.problems.items() if p.metric is not None}
        for step, made in self.steps.items():
            coded = dict(made())
            for site, own in coded.items():
                if metric := self.problems[site].metric:
                    weight = self.problems[site].weight.float()
                    found.proxy[site][step] = metric.loss(own.decode(weight) - weight) / whole[site]
        if limits is not None:
            found.limits.update({site: limits(p, coded[site].decode(p.target)) for site, p in self.problems.items()})
        return found


@dataclass(frozen=True)
class Draft:
    """Rounded layers whose errors are found when they are asked for: those of most trials nobody reads."""

    rounded: Rounded  # without errors
    limits: Limits | None
    ranks: Ranks
    parts: list[_Part] = field(default_factory=list)  # those that this process has rounded

    def judged(self) -> Rounded:
        """The layers with their errors. Several processes ask for them together."""
        every = self.ranks.gather("errors of layers", [part.errors(self.limits) for part in self.parts])
        return _with_errors(self.rounded, [one for of_rank in every for one in of_rank])


@dataclass(frozen=True)
class LayerRounder:
    """Rounds layers to their fitted codebooks, at chosen rates."""

    cache: CodebookCache
    rates: Sequence[Rate]  # of the cache's table groups
    compensation: Compensation
    refit: Refit | None
    ids: Mapping[str, UInt8[Tensor, "_"]]  # by `Site.reads`: the packed group ids of layers with several channel groups
    limits: Limits | None = None  # None: nobody asks for them
    ranks: Ranks = ALONE  # the processes that layers are dealt to, those with a common table to one

    @property
    def problems(self) -> Mapping[Site, LayerProblem]:
        """What each layer is rounded to, and by which metric."""
        return self.cache.problems

    def with_targets(self, targets: Mapping[Site, Float[Tensor, "_ _"]], *, fit: bool = True) -> "LayerRounder":
        """The same towards other targets of some layers (`CodebookCache.with_targets`)."""
        return replace(self, cache=self.cache.with_targets(targets, fit=fit))

    def with_problems(self, problems: Mapping[Site, LayerProblem]) -> "LayerRounder":
        """The same for other problems of some layers (`CodebookCache.with_problems`)."""
        return replace(self, cache=self.cache.with_problems(problems))

    def round(self, sites: Sequence[Site], flags: list[str], step: str = "feedback") -> Rounded:
        """Round `sites` to their targets.

        The proxy error of a layer is its metric's loss of the error over that of the weight, both against full precision. It is
        noted after `nearest` (no compensation), after `step` (the compensation's codes) and after `refit`; a layer without a
        metric has none, and a codebook that codes rows together no `nearest`, which would take as long as all the rest.
        """
        return self._round(sites, flags, step, lambda part: part.errors(self.limits))

    def draft(self, sites: Sequence[Site], flags: list[str], step: str = "feedback") -> Draft:
        """The same without errors, which can be asked for afterwards; what they are found from is kept until then."""
        parts: list[_Part] = []

        def keep(part: _Part) -> _Errors:
            parts.append(part)
            return _Errors()

        return Draft(self._round(sites, flags, step, keep), self.limits, self.ranks, parts)

    def _round(self, sites: Sequence[Site], flags: list[str], step: str, judge: Callable[[_Part], _Errors]) -> Rounded:
        """Layers that share tables are dealt together, rounded and judged; then every process has all of them."""
        together = list(_sharing(self.cache.table_groups, sites))
        whose = self.ranks.deal([sum(map(_cost, part)) for part in together])
        made = {}
        for number in progress([n for n, rank in enumerate(whose) if rank == self.ranks.rank], "layers"):
            part = self._part(together[number], step)
            made[number] = part.layers(), part.flags, judge(part)
        found = {number: part for of_rank in self.ranks.gather("rounded layers", made) for number, part in of_rank.items()}
        rounded = Rounded()
        for number in range(len(together)):
            layers, taken, _ = found[number]
            flags += taken
            for site, (slices, decoded) in layers.items():
                rounded.stored[site], rounded.decoded[site] = self._store(self.problems[site], slices), decoded
        return _with_errors(rounded, [errors for _, _, errors in found.values()])

    def _part(self, sites: Sequence[Site], step: str) -> _Part:
        """Layers that share tables, rounded: all steps but `nearest`, which no other needs, are done when this returns."""
        problems, flags = {site: self.problems[site] for site in sites}, list[str]()
        fitted = _fitted(self.cache, self.rates, sites, flags)
        if isinstance(self.compensation, FitsTargets) and self.compensation.fits_targets:
            met = {site: self.compensation.met(p.target, _metric(p), fitted[site], p.score) for site, p in problems.items()}
            fitted = _fitted(self.cache.with_targets(met), self.rates, sites, flags)
        steps: dict[str, Callable[[], Mapping[Site, _Coded]]] = {}
        if not self.cache.codebook.spans_rows:
            plain = replace(self, compensation=NoCompensation())
            steps["nearest"] = lambda: {site: plain._compensated(problems[site], own, []) for site, own in fitted.items()}
        first = coded = {site: self._compensated(problems[site], own, flags) for site, own in fitted.items()}
        steps[step] = lambda: first
        if self.refit is not None:
            coded = self._refitted(coded)
            for _ in range(self.refit.rounds - 1):
                again = {site: self._compensated(problems[site], own.slices, []) for site, own in coded.items()}
                again = self._refitted(again)
                if not _loss(problems, again) < _loss(problems, coded):
                    break
                coded = again
            last = coded
            steps["refit"] = lambda: last
        return _Part(problems, steps, flags)

    def _compensated(self, problem: LayerProblem, slices: list[FittedSlice], flags: list[str]) -> _Coded:
        return _Coded(slices, list(self.compensation.round(problem.target, problem.metric, slices, problem.score, flags)))

    def _refitted(self, coded: Mapping[Site, _Coded]) -> dict[Site, _Coded]:
        """The tables of one table group after the other, each given the others.

        A table group in which layers outside of `coded` have slices stays as it is.
        """
        assert self.refit is not None
        moved = {site: replace(own, slices=list(own.slices)) for site, own in coded.items()}
        targets = {site: self.problems[site].target.float() for site in coded}
        values = {site: own.decode(targets[site]) for site, own in moved.items()}
        for table_group in self.cache.table_groups:
            if any(channel_slice.site not in moved for channel_slice in table_group.slices):
                continue
            parts = []
            for channel_slice in table_group.slices:
                site, own = channel_slice.site, moved[channel_slice.site]
                metric = _metric(self.problems[site])
                columns = channel_slice.columns.to(values[site].device).long()
                lacking = targets[site] - values[site]
                lacking[:, columns] = targets[site][:, columns]
                fitted, codes = own.slices[channel_slice.group], own.codes[channel_slice.group]
                parts.append(CodedSlice(fitted=fitted, codes=codes, target=lacking, metric=metric))
            for part, codebook in zip(parts, self.refit(parts), strict=True):
                channel_slice = part.fitted.channel_slice
                site, columns = channel_slice.site, channel_slice.columns.to(part.target.device).long()
                moved[site].slices[channel_slice.group] = replace(part.fitted, codebook=codebook)
                values[site][:, columns] = codebook.weight(part.codes).decode()
        return moved

    def _store(self, problem: LayerProblem, slices: tuple[QuantizedWeight, ...]) -> QuantizedWeight:
        """The layer as it is stored; what several layers have in common (group ids, signs) is one object in all of them."""
        site = problem.site
        stored = slices[0] if site.reads not in self.ids else GroupedWeight(slices, self.ids[site.reads], site.in_features)  # type: ignore[arg-type]
        if problem.transform:
            stored = problem.transform.wrap(stored)
        return stored if problem.outliers is None else OutlierWeight(stored, problem.outliers)


def _with_errors(rounded: Rounded, errors: Iterable[_Errors]) -> Rounded:
    found = list(errors)
    proxy = {site: own for part in found for site, own in part.proxy.items()}
    limits = {site: own for part in found for site, own in part.limits.items()}
    return replace(rounded, proxy=proxy, limits=limits)


def _cost(site: Site) -> int:
    """What rounding a layer takes, in thirds of a multiplication: its feedback, and the factor of its Gram."""
    return site.in_features**2 * (3 * site.out_features + site.in_features)


def _metric(problem: LayerProblem) -> Metric:
    assert problem.metric is not None, "the method's checks ask for a metric"
    return problem.metric


def _fitted(
    cache: CodebookCache, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str]
) -> dict[Site, list[FittedSlice]]:
    """The slices of each layer with their codebooks, in the order of their channel groups."""
    fitted: dict[Site, list[FittedSlice]] = {site: [] for site in sites}
    for number, table_group in enumerate(cache.table_groups):
        if not any(channel_slice.site in fitted for channel_slice in table_group.slices):
            continue
        codebooks, taken = cache(number, rates[number])
        distortion = cache.codebook.distortion(rates[number])
        flags += taken
        for channel_slice, codebook in zip(table_group.slices, codebooks, strict=True):
            if channel_slice.site in fitted:
                fitted[channel_slice.site].append(FittedSlice(channel_slice, codebook, distortion))
    return {site: sorted(slices, key=lambda f: f.channel_slice.group) for site, slices in fitted.items()}


def _loss(problems: Mapping[Site, LayerProblem], coded: Mapping[Site, _Coded]) -> float:
    """The metric's loss of what was to be rounded."""
    total = 0.0
    for site, own in coded.items():
        metric, target = problems[site].metric, problems[site].target.float()
        assert metric is not None, "the method's checks ask for a metric"
        total += metric.loss(own.decode(target) - target)
    return total


def _sharing(table_groups: Sequence[TableGroup], sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites in runs between which no table is shared, so that one run is rounded and refitted without the others."""
    left, linked = list(sites), [{s.site for s in table_group.slices} for table_group in table_groups]
    while left:
        together = {left[0]}
        while grown := set().union(*(s for s in linked if s & together)) - together:
            together |= grown
        yield [site for site in left if site in together]
        left = [site for site in left if site not in together]
