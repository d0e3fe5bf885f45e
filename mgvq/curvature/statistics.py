"""The statistics of all layers in one streamed pass over the calibration data: one forward, up to two backwards a batch.

Products are taken in float32 within a batch and added up in float64, so that the cut into batches and their order move the result
by 1e-6 at most; but for a Gram that clips its tokens, each by those of its batch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.curvature.fusion import balanced
from mgvq.errors import UserError
from mgvq.model.answers import logs_in_runs
from mgvq.model.passes import Forward, LossOf, Rows, forward, right_losses, sampled_losses
from mgvq.progress import chained, progress
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.types import MODALITIES, Batch, Kronecker, Modality, Needs, Site, SiteStats, StatsBank


def collect(
    model: torch.nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    needs: Needs,
    seed: int,
    further: Iterable[Batch] = (),
    *,
    whole: bool = True,
    ranks: Ranks = ALONE,
) -> StatsBank:
    """Collect what `needs` asks for, in float32 on the CPU. `seed` draws the sampled labels, each sample's from its own stream.

    The plain Gram sees the `further` batches too, in forward passes alone; nothing else does, and where `needs` asks for no Gram
    they are not looked at.

    `sites` that are not the `whole` of what is quantised may lie where no sample comes: whoever has all of them checks that.
    Of several processes (`ranks`) each gives its own share of both kinds of batches, and gets the statistics of all.
    Sites that read the same hold the very same Gram tensor. Sites that are never called have no tokens, and zeros.

    `sequence` and `token` estimate F, the Fisher of the mean answer loss over N answer tokens (YAQA, Tseng et al. 2025;
    docs/method.md, eq. (sketch-b) and (sketch-a)). Let g be the gradient at a token and `G_s` the gradient of a layer's weight in
    sample s, both of the summed loss under sampled labels:

        sequence  F = sum_s vec(G_s) vec(G_s)^T / N  ~  (sum_s G_s G_s^T) (x) (sum_s G_s^T G_s) / (N sum_s |G_s|^2)
        token     F ~ sum_t (g g^T) (x) (x x^T) / N  ~  h_out (x) h_in  after `power_rounds` rounds of
                  h_out <- sum_t (x^T h_in x) g g^T / (N |h_in|^2),   h_in <- sum_t (g^T h_out g) x x^T / (N |h_out|^2)
                  from h_out = I, thus h_in = sum_t |g|^2 x x^T / (N out). Each half-step is one more pass over the kept batches.

    Raises UserError for inputs, answers or statistics that are not finite, naming the layer; for a tower that no batch reaches
    (the vision tower without images); and for sequences of the vision tower as `passes.Rows` does. Raises RuntimeError for sites
    that do not read what they are said to read.
    """
    if needs.power_rounds and isinstance(batches, Iterator):
        batches = list(batches)
    sums = StatisticsSums(needs)
    sampled, answered = asks_sampled(needs), asks_answered(needs)
    further = further if needs.gram else ()
    if not (sampled or answered):  # the Gram is all there is: its batches are all alike
        batches, further = chained(batches, further), ()
    for batch, rows, run in _runs(model, sites, batches, sums.add_inputs, graph=sampled or answered):
        sums.num_answers += len(run.states)
        for kind, gradients in run.gradients(losses(needs, batch, seed)):
            for site, g in gradients.items():
                sums.add_gradient(kind, rows, site, run.inputs[site.reads], g)
    if whole:
        reached = ranks.gather("reached layers", {site for site in sites if sums.reached(site)})
        check_reached(sites, set[Site]().union(*reached))
    for _ in _runs(model, sites, further, sums.add_inputs, graph=False):
        pass
    sums.add_up(ranks)
    token = _power_iteration(model, sites, batches, seed, sums, ranks) if needs.power_rounds else {}
    return {site: sums.stats(site, token.get(site)) for site in sites}


def asks_sampled(needs: Needs) -> bool:
    """Whether it takes gradients under sampled labels."""
    return needs.fisher or needs.sequences or needs.power_rounds > 0


def asks_answered(needs: Needs) -> bool:
    """Whether it takes gradients under the right answers."""
    return needs.saliency or needs.gradient or needs.channel_groups > 0


def losses(needs: Needs, batch: Batch, seed: int) -> dict[str, LossOf]:
    """The losses whose gradients it takes: `sampled` and `answered`. They raise UserError as `check_answers` does."""
    found = {"sampled": sampled_losses(batch, seed)} if asks_sampled(needs) else {}
    found |= {"answered": right_losses(batch)} if asks_answered(needs) else {}
    return {kind: _checked(loss, batch) for kind, loss in found.items()}


def _checked(loss: LossOf, batch: Batch) -> LossOf:
    def checked(logs: Tensor, few: slice) -> Tensor:
        check_answers(logs, batch, few)
        return loss(logs, few)

    return checked


def check_reached(sites: Sequence[Site], reached: Set[Site]) -> None:
    """Raises UserError for a tower of which no layer was reached."""
    if unseen := {site.tower for site in sites} - {site.tower for site in reached}:
        raise UserError(
            f"no calibration sample reaches the {' and the '.join(sorted(unseen))} layers: take samples with images, or "
            "scope=language."
        )


class StatisticsSums:
    """Keeps sums by statistic and layer, in float64, and makes the statistics of a layer from them in the end.

    A sum that nothing was added to is a tensor of zeros, which layers of one shape share: for a modality that the data does not
    have, zeros of their own would fill gigabytes. `put` says where sums are kept (`BlockWalk.put`); None: in memory.
    """

    def __init__(self, needs: Needs, put: Callable[[Tensor], Tensor] | None = None) -> None:
        self.needs, self._put = needs, put
        self.num_answers = 0
        self._num_tokens: Counter[tuple[str, Modality]] = Counter()  # of the inputs, by what reads them
        self._num_answered: Counter[tuple[str, Modality]] = Counter()  # of the gradients of right answers, by layer
        self._tensors: dict[tuple[str, ...], Tensor] = {}
        self._grams: dict[str, dict[Modality, Tensor]] = {}
        self._zeros: dict[tuple[int, ...], Tensor] = {}

    def add(self, key: tuple[str, ...], value: Tensor) -> None:
        if key in self._tensors:
            self._tensors[key] += value
        else:
            self._tensors[key] = value.double() if self._put is None else self._put(value.double())

    def add_up(self, ranks: Ranks) -> None:
        """Let these be the sums of all processes."""
        counts = ranks.gather("counts", (self.num_answers, self._num_tokens, self._num_answered))
        self.num_answers, self._num_tokens, self._num_answered = 0, Counter(), Counter()
        for answers, tokens, answered in counts:
            self.num_answers += answers
            self._num_tokens.update(tokens)
            self._num_answered.update(answered)
        self._tensors = ranks.total("statistics", self._tensors)

    def take(self, key: tuple[str, ...], *shape: int) -> Tensor:
        """Hand over the sum in float32 on the CPU. Raises UserError where it is not finite."""
        if key not in self._tensors:
            return self._zeros.setdefault(shape, torch.zeros(shape))
        total = self._tensors.pop(key).float().cpu()
        if not torch.isfinite(total).all():
            raise UserError(
                f"the statistics of {key[1]} ({key[0]}) are not finite: gradients or activations leave the range of the model's "
                "dtype. Set model.dtype=float32; where that does not help, weights of this layer or near it are too large."
            )
        return total

    def reached(self, site: Site) -> bool:
        """Whether the site has seen a token."""
        return any(self._num_tokens[site.reads, m] for m in MODALITIES)

    def add_inputs(self, rows: Rows, site: Site, x: Float[Tensor, "... in"]) -> None:
        for modality, tokens in rows.by_modality(site, x).items():
            self._num_tokens[site.reads, modality] += len(tokens)
            if self.needs.gram and len(tokens):
                clip = self.needs.clip
                gram = tokens.T @ tokens if clip is None else _weighted_gram(tokens, clipped_weights(tokens, clip))
                self.add(("gram", site.reads, modality), gram)

    def add_gradient(self, kind: str, rows: Rows, site: Site, x: Float[Tensor, "... in"], g: Float[Tensor, "... out"]) -> None:
        """Of one of the `losses`."""
        (self.add_sampled if kind == "sampled" else self.add_answered)(rows, site, x, g)

    def add_sampled(self, rows: Rows, site: Site, x: Float[Tensor, "... in"], g: Float[Tensor, "... out"]) -> None:
        if self.needs.fisher:
            for modality, tokens in rows.by_modality(site, g).items():
                if len(tokens):
                    self.add(("fisher", site.name, modality), tokens.T @ tokens)
        if self.needs.sequences:
            for g_s, x_s in zip(rows.by_sample(site, g), rows.by_sample(site, x), strict=True):
                gradient = g_s.T @ x_s
                self.add(("sequence_in", site.name), gradient.T @ gradient)
                self.add(("sequence_out", site.name), gradient @ gradient.T)
        if self.needs.power_rounds:
            self.add(("token", site.name), _weighted_gram(rows.all(site, x), rows.all(site, g).square().mean(-1)))

    def add_answered(self, rows: Rows, site: Site, x: Float[Tensor, "... in"], g: Float[Tensor, "... out"]) -> None:
        if self.needs.gradient:
            self.add(("gradient", site.name), g.flatten(0, -2).T @ x.flatten(0, -2))
        if self.needs.saliency:
            for modality, sizes in rows.by_modality(site, g.abs().mean(-1, keepdim=True)).items():
                self._num_answered[site.name, modality] += len(sizes)
                self.add(("saliency", site.name, modality), sizes.sum())
        if self.needs.channel_groups:
            inputs = rows.all(site, x)
            runs = rows.all(site, g).square().chunk(self.needs.channel_groups, -1)
            self.add(("channel_gram", site.name), torch.stack([_weighted_gram(inputs, run.mean(-1)) for run in runs]))

    def stats(self, site: Site, token: Kronecker | None) -> SiteStats:
        needs, name, num_in, num_out = self.needs, site.name, site.in_features, site.out_features
        if needs.gram and site.reads not in self._grams:
            self._grams[site.reads] = {m: self.take(("gram", site.reads, m), num_in, num_in) for m in MODALITIES}
        fisher: dict[Modality, Tensor] = {}
        saliency: dict[Modality, float] = {}
        gradient, channel_gram, sequence = None, None, None
        if needs.fisher:
            fisher = {m: self.take(("fisher", name, m), num_out, num_out) for m in MODALITIES}
        if needs.saliency:
            saliency = {m: float(self.take(("saliency", name, m))) / n for m in MODALITIES if (n := self._num_answered[name, m])}
        if needs.gradient:
            gradient = self.take(("gradient", name), num_out, num_in) / max(1, self.num_answers)
        if needs.channel_groups:
            groups = len(torch.empty(num_out).chunk(needs.channel_groups))
            channel_gram = self.take(("channel_gram", name), groups, num_in, num_in)
        if needs.sequences:
            h_in, h_out = self.take(("sequence_in", name), num_in, num_in), self.take(("sequence_out", name), num_out, num_out)
            sequence = sketch(h_in, h_out, self.num_answers)
        num_tokens: dict[Modality, int] = {m: self._num_tokens[site.reads, m] for m in MODALITIES}
        gram = self._grams.get(site.reads, {})
        return SiteStats(num_tokens, gram, self.num_answers, fisher, saliency, gradient, channel_gram, sequence, token)


def sketch(inputs: Float[Tensor, "in in"], outputs: Float[Tensor, "out out"], num_answers: int) -> Kronecker:
    """YAQA's sketch B from `sum_s G_s^T G_s` and `sum_s G_s G_s^T`, scaled to the trace that the mean answer loss has.

    See docs/method.md, eq. (sketch-b).
    """
    trace = num_answers * outputs.double().trace()
    return balanced(inputs.double() / trace if trace > 0 else inputs, outputs)


def clipped_weights(tokens: Float[Tensor, "tokens c"], clip: float) -> Float[Tensor, "tokens"]:
    """Weights that bring the energy of tokens down to `clip` times the median: `min(1, clip * median / |x|^2)`.

    See docs/method.md, eq. (clip). The median (of an even number the lower one) is that of the tokens at hand, those of one
    modality in one batch, so that statistics can be streamed; calibration sets cut batches of a fixed size, so that nothing else
    moves it. Where it is 0, most tokens being zeros, there is nothing to measure the others by, and all weigh 1.
    """
    energy = tokens.square().sum(-1)
    most = clip * energy.median()
    return torch.where((energy > most) & (most > 0), most / energy, 1.0)


def _weighted_gram(rows: Float[Tensor, "tokens c"], weights: Float[Tensor, "tokens"]) -> Float[Tensor, "c c"]:
    return (rows * weights[:, None]).T @ rows


def _runs(
    model: torch.nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    see: Callable[[Rows, Site, Tensor], None],
    *,
    graph: bool,
) -> Iterator[tuple[Batch, Rows, Forward]]:
    """Run every batch forward and yield it with its rows and what the pass left behind; `see` gets what the sites read."""
    device = next(model.parameters()).device
    for batch in progress(batches, "batches of statistics"):
        batch = batch.to(device)
        rows = Rows.of(batch)
        run = forward(model, sites, batch, watched(partial(see, rows)), graph=graph)
        if not graph:  # else the losses are looked at
            for few, logs in logs_in_runs(model, run.states):
                check_answers(logs, batch, few)
        yield batch, rows, run


def check_answers(logs: Float[Tensor, "few vocabulary"], batch: Batch, few: slice) -> None:
    """Raises UserError, with the sample, for log-probabilities that are NaN; `few`: which of the batch's answers they are of."""
    if logs.isnan().any():
        raise UserError(
            f"the answers of the calibration sample {_first_bad(logs, batch, few)} have no probabilities (NaN), "
            "though the inputs of all layers in scope are: the weights behind them (the head, the last norm) are damaged, or "
            "their values leave the range of the model's dtype; model.dtype=float32 has the widest."
        )


def watched(see: Callable[[Site, Tensor], None]) -> Callable[[Site, Tensor], None]:
    """The same behind a watch (`Watch`), which begins with the model's inputs."""
    watch = Watch()

    def looked_at(site: Site, x: Tensor) -> None:
        watch(site, x)
        see(site, x)

    return looked_at


class Watch:
    """Raises UserError, with the layer's name, for inputs of a layer that are not finite.

    Layers are called in the order of the forward pass, so that the first one that is named comes right behind the fault.
    """

    def __init__(self) -> None:
        self.last = "the inputs of the model"

    def __call__(self, site: Site, x: Tensor) -> None:
        if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():  # a sum is fifty times as fast, and may overflow
            raise UserError(
                f"what {site.name} reads is not finite (NaN or infinity) for a calibration sample: a weight or bias between "
                f"{self.last} and {site.name} is damaged, or activations leave the range of the model's dtype there; "
                "model.dtype=float32 has the widest."
            )
        self.last = site.name


def _first_bad(logs: Float[Tensor, "few vocabulary"], batch: Batch, few: slice) -> str:
    """Return the name of the first sample with an answer token whose log-probabilities are NaN."""
    answer = (few.start or 0) + int(logs.isnan().any(1).nonzero()[0, 0])
    ends = batch.loss_mask.sum(1).cumsum(0).cpu()
    return batch.sample_ids[int(torch.searchsorted(ends, answer, right=True))]


def _power_iteration(
    model: torch.nn.Module, sites: Sequence[Site], batches: Iterable[Batch], seed: int, first: StatisticsSums, ranks: Ranks
) -> dict[Site, Kronecker]:
    """Run the rounds of YAQA's sketch A, each of two passes, from the sums of the first half-step.

    See docs/method.md, eq. (sketch-a).
    """

    def half_step(known: dict[Site, Tensor], *, outputs: bool) -> dict[Site, Tensor]:
        """Return the factors of the outputs from those of the inputs, or the other way round."""
        sums = StatisticsSums(Needs())
        for batch, rows, run in _runs(model, sites, batches, lambda *_: None, graph=True):
            ((_, gradients),) = run.gradients({"sampled": _checked(sampled_losses(batch, seed), batch)})
            for site, g in gradients.items():
                x, g = rows.all(site, run.inputs[site.reads]), rows.all(site, g)
                wanted, other = (g, x) if outputs else (x, g)
                weights = ((other @ known[site].to(other)) * other).sum(-1)
                sums.add(("token", site.name), _weighted_gram(wanted, weights))
        sums.add_up(ranks)
        found = {}
        for site, factor in known.items():
            size = site.out_features if outputs else site.in_features
            total, norm = sums.take(("token", site.name), size, size), factor.double().square().sum() * first.num_answers
            found[site] = (total / norm).float() if norm > 0 else total
        return found

    h_in = {s: first.take(("token", s.name), s.in_features, s.in_features) / max(1, first.num_answers) for s in sites}
    h_out: dict[Site, Tensor] = {}
    for _ in range(first.needs.power_rounds):
        h_out = half_step(h_in, outputs=True)
        h_in = half_step(h_out, outputs=False)
    return {s: balanced(h_in[s], h_out[s]) for s in sites}
