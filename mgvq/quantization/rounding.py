"""From chosen rates to stored weights: tables fitted, codes chosen, tables refitted; and the proxy error after each of these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def decode(self, like: Tensor) -> Float[Tensor, "out in"]:
        values = like.new_empty(like.shape).float()
        for fitted, codes in zip(self.slices, self.codes, strict=True):
            values[:, fitted.channel_slice.columns.to(like.device).long()] = fitted.codebook.weight(codes).decode()
        return values


@dataclass(frozen=True)
class Draft:
    """Layers that share tables, rounded. Their errors are found when they are asked for: those of most trials nobody reads."""

    rounded: Rounded  # without proxy errors and limits
    problems: Mapping[Site, LayerProblem]
    steps: Mapping[str, Callable[[], Mapping[Site, _Coded]]]  # of the rounding, in order, and what they leave
    limits: Limits | None

    def judged(self) -> Rounded:
        """The layers with their errors."""
        errors: dict[Site, dict[str, float]] = {site: {} for site in self.problems}
        limits: dict[Site, Limit] = {}
        coded: Mapping[Site, _Coded] = {}
        for step, found in self.steps.items():
            coded = found()
            _note(errors, step, self.problems, coded)
        if self.limits is not None:
            limits = {site: self.limits(p, coded[site].decode(p.target)) for site, p in self.problems.items()}
        return replace(self.rounded, proxy=errors, limits=limits)


@dataclass(frozen=True)
class LayerRounder:
    """Rounds layers to their fitted codebooks."""

    compensation: Compensation
    refit: Refit | None
    ids: Mapping[str, UInt8[Tensor, "_"]]  # by `Site.reads`: the packed group ids of layers with several channel groups
    limits: Limits | None = None  # None: nobody asks for them

    def round(
        self, cache: CodebookCache, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str], step: str = "feedback"
    ) -> Rounded:
        """Round `sites` to their targets; `cache` and `rates` are of all table groups.

        The proxy error of a layer is its metric's loss of the error over that of the weight, both against full precision. It is
        noted after `nearest` (no compensation), after `step` (the compensation's codes) and after `refit`; a layer without a
        metric has none, and a codebook that codes rows together no `nearest`, which would take as long as all the rest.
        """
        rounded = Rounded()
        for draft in self.drafts(cache, rates, sites, flags, step):
            rounded |= draft.judged()
        return rounded

    def drafts(
        self, cache: CodebookCache, rates: Sequence[Rate], sites: Sequence[Site], flags: list[str], step: str = "feedback"
    ) -> Iterator[Draft]:
        """What `round` puts together, as far as layers share tables."""
        for together in progress(list(_sharing(cache.table_groups, sites)), "layers"):
            problems, rounded = {site: cache.problems[site] for site in together}, Rounded()
            steps = self._steps(cache, problems, rates, flags, step)
            for site, own in list(steps.values())[-1]().items():
                rounded.decoded[site] = problems[site].in_own_basis(own.decode(problems[site].target))
                rounded.stored[site] = self._store(problems[site], own)
            yield Draft(rounded, problems, steps, self.limits)

    def _steps(
        self,
        cache: CodebookCache,
        problems: Mapping[Site, LayerProblem],
        rates: Sequence[Rate],
        flags: list[str],
        step: str,
    ) -> dict[str, Callable[[], Mapping[Site, _Coded]]]:
        """What each step leaves, in order: all but the first one, which no other needs, are done when this returns."""
        sites = list(problems)
        fitted = _fitted(cache, rates, sites, flags)
        if isinstance(self.compensation, FitsTargets) and self.compensation.fits_targets:
            met = {site: self.compensation.met(p.target, _metric(p), fitted[site], p.score) for site, p in problems.items()}
            fitted = _fitted(cache.with_targets(met), rates, sites, flags)
        steps: dict[str, Callable[[], Mapping[Site, _Coded]]] = {}
        if not cache.codebook.spans_rows:
            plain = replace(self, compensation=NoCompensation())
            steps["nearest"] = lambda: {site: plain._compensated(problems[site], own, []) for site, own in fitted.items()}
        first = coded = {site: self._compensated(problems[site], own, flags) for site, own in fitted.items()}
        steps[step] = lambda: first
        if self.refit is not None:
            coded = self._refitted(cache, coded)
            for _ in range(self.refit.rounds - 1):
                again = {site: self._compensated(problems[site], own.slices, []) for site, own in coded.items()}
                again = self._refitted(cache, again)
                if not _loss(problems, again) < _loss(problems, coded):
                    break
                coded = again
            last = coded
            steps["refit"] = lambda: last
        return steps

    def _compensated(self, problem: LayerProblem, slices: list[FittedSlice], flags: list[str]) -> _Coded:
        return _Coded(slices, list(self.compensation.round(problem.target, problem.metric, slices, problem.score, flags)))

    def _refitted(self, cache: CodebookCache, coded: Mapping[Site, _Coded]) -> dict[Site, _Coded]:
        """The tables of one table group after the other, each given the others.

        A table group in which layers outside of `coded` have slices stays as it is.
        """
        assert self.refit is not None
        moved = {site: replace(own, slices=list(own.slices)) for site, own in coded.items()}
        targets = {site: cache.problems[site].target.float() for site in coded}
        values = {site: own.decode(targets[site]) for site, own in moved.items()}
        for table_group in cache.table_groups:
            if any(channel_slice.site not in moved for channel_slice in table_group.slices):
                continue
            parts = []
            for channel_slice in table_group.slices:
                site, own = channel_slice.site, moved[channel_slice.site]
                metric = _metric(cache.problems[site])
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

    def _store(self, problem: LayerProblem, coded: _Coded) -> QuantizedWeight:
        site, slices = problem.site, tuple(f.codebook.weight(c) for f, c in zip(coded.slices, coded.codes, strict=True))
        stored = slices[0] if site.reads not in self.ids else GroupedWeight(slices, self.ids[site.reads], site.in_features)  # type: ignore[arg-type]
        if problem.transform:
            stored = problem.transform.wrap(stored)
        return stored if problem.outliers is None else OutlierWeight(stored, problem.outliers)


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


def _note(
    errors: dict[Site, dict[str, float]], step: str, problems: Mapping[Site, LayerProblem], coded: Mapping[Site, _Coded]
) -> None:
    for site, own in coded.items():
        if metric := problems[site].metric:
            weight = problems[site].weight.float()
            errors[site][step] = metric.loss(own.decode(weight) - weight) / max(metric.loss(problems[site].whole()), 1e-30)


def _sharing(table_groups: Sequence[TableGroup], sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites in runs between which no table is shared, so that one run is rounded and refitted without the others."""
    left, linked = list(sites), [{s.site for s in table_group.slices} for table_group in table_groups]
    while left:
        together = {left[0]}
        while grown := set().union(*(s for s in linked if s & together)) - together:
            together |= grown
        yield [site for site in left if site in together]
        left = [site for site in left if site not in together]
