"""The block loop of the gradient term, on a shipped model: what fails the run, what is flagged, what it leaves as it was."""

import pytest
import torch
from conftest import documented_columns, layer_problems

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.codebook.kmeans import KMeans
from mgvq.compensation.gradient_hessian import GradientHessian
from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.errors import SharedFault, UserError
from mgvq.model.pack import packed_batches
from mgvq.model.sites import list_sites, site_weights
from mgvq.model.weights import InModel
from mgvq.quantization.blockwise import blockwise_rounding
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.quantization.teacher import Teacher
from mgvq.runs.journal import Journal
from mgvq.types import Metric, SiteStats

GRADIENT = dict(
    damping=0.1,
    output_damping=None,
    source="kl",
    start="full_precision",
    refresh=True,
    sweeps=1,
    steps=[0.0, 0.1],
    shift_damping=0.05,
)


def draw():
    return TinyVQA(num_images=2, questions_per_image=2, heldout_images=1, shown="both", seed=0, label_seed=0).draw()


@pytest.fixture(scope="session", params=["tiny_internvl", "tiny_smolvlm"])
def family(request: pytest.FixtureRequest) -> str:
    """Two of the shipped models: the loop is the same for all."""
    return request.param


@pytest.fixture
def loop(loaded):
    """Runs the block loop over two small layers of each of two blocks; returns what `blockwise_rounding` does and the flags."""
    model = loaded.model
    sites = [s for s in list_sites(model, "language") if s.kind in ("k_proj", "v_proj") and s.block in (1, 2)]
    drawn, weights = draw(), site_weights(model, sites)
    batches, heldout = (list(packed_batches(loaded.processor, e, 2)) for e in (drawn.examples, drawn.heldout_examples))
    codebook = KMeans(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=2, sample=None, seed=0)
    scores = {s: torch.arange(s.in_features).float() for s in sites}
    metrics = {s: Metric((torch.eye(s.in_features),), torch.eye(s.out_features)) for s in sites}
    problems = layer_problems(sites, weights={s: w.clone() for s, w in weights.items()}, metrics=metrics, scores=scores)
    table_groups = cut_table_groups(problems, codebook)
    rates = [next(r for r in codebook.rates() if r.index_bits == 1.0)] * len(table_groups)

    def run(bank=None, finished=None, **settings):
        shift, flags = GradientHessian(**GRADIENT | settings), []
        rounder = LayerRounder(CodebookCache(table_groups, codebook, problems), rates, shift, None, {})
        subject = Subject(model, sites, Samples(batches, heldout))
        return *blockwise_rounding(subject, bank or {}, shift, rounder, flags, finished), flags

    run.sites, run.model = sites, model
    return run


def test_gradient_heldout_and_test_pictures_are_apart() -> None:
    drawn = draw()
    parts = [{e.image.tobytes() for e in part} for part in (drawn.examples, drawn.heldout_examples)]
    parts.append({picture.pixels.tobytes() for picture in draw_test("test", 0, 200)})
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_a_gradient_of_zero_fails_the_run_and_leaves_the_model_as_it_was(loop) -> None:
    before = {s: w.clone() for s, w in site_weights(loop.model, loop.sites).items()}
    zeros = {s: SiteStats(num_tokens={}, gram={}, gradient=torch.zeros(s.out_features, s.in_features)) for s in loop.sites}
    with pytest.raises(UserError, match="gradient is zero"):
        loop(zeros, source="sft", refresh=False)
    assert all(torch.equal(w, before[s]) for s, w in site_weights(loop.model, loop.sites).items())


def test_a_step_of_zero_everywhere_is_flagged(loop) -> None:
    rounded, blocks, flags = loop(steps=[0.0])
    assert "no_step" in flags
    assert set(rounded.stored) == set(loop.sites)
    assert blocks.chosen.all()


def test_proxy_errors_of_a_shifted_target_are_measured_against_full_precision(loop) -> None:
    """Trials overwrite the model's weights: what the second of them, and a second sweep, measure against must not follow."""
    before = {s: w.clone() for s, w in site_weights(loop.model, loop.sites).items()}
    rounded, blocks, _ = loop(sweeps=2, steps=[0.0, 0.4])
    assert blocks[blocks.chosen].step.max() > 0
    for site, weight in before.items():
        metric = Metric((torch.eye(site.in_features),), torch.eye(site.out_features))
        expected = metric.loss(rounded.decoded[site] - weight) / metric.loss(weight)
        assert list(rounded.proxy[site].values())[-1] == pytest.approx(expected)


def test_every_column_of_the_blocks_is_documented(loop) -> None:
    assert list(loop(steps=[0.0])[1].columns) == documented_columns("blocks.parquet")


def test_later_sweeps_never_raise_the_heldout_loss(loop) -> None:
    _, blocks, _ = loop(sweeps=3, steps=[0.0, 0.05, 0.2])
    losses = blocks[blocks.chosen].heldout_loss
    after_first = blocks[(blocks.sweep == 0) & blocks.chosen].heldout_loss.iloc[-1]
    later = losses[blocks[blocks.chosen].sweep > 0]
    assert later.is_monotonic_decreasing
    assert (later < after_first).all()
    assert blocks[blocks.sweep == 1].gradient_norm.gt(0).all(), "from the second sweep on the first block has a gradient too"


def test_from_a_rounded_start_every_block_has_a_gradient_and_none_may_lose(loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep 0 is what plain compensation gives, and asks for no loss; what follows has to beat it."""
    asked, whole = [], Teacher.heldout_loss

    def counted(self, race=None):
        found = whole(self, race)
        asked.append(found.mean)
        return found

    monkeypatch.setattr(Teacher, "heldout_loss", counted)
    plain, _, _ = loop(steps=[0.0])
    reached = asked[-1]
    asked.clear()
    rounded, blocks, _ = loop(start="rounded", steps=[0.0, 0.05, 0.2])
    first, later = blocks[blocks.sweep == 0], blocks[blocks.sweep == 1]
    assert (first.step == 0).all()
    assert first.chosen.all()
    assert first.heldout_loss.isna().all()
    assert asked == [reached, *later.heldout_loss], "once for the model that is rounded, once for every trial"
    assert later.gradient_norm.gt(0).all()
    assert later.heldout_before.iloc[0] == reached
    assert (later.heldout_loss[later.chosen] < later.heldout_before[later.chosen]).all()
    still = set(first.site) - set(later.site[later.chosen])
    assert all(torch.equal(rounded.decoded[s], plain.decoded[s]) for s in loop.sites if s.name in still)


def test_the_prediction_and_the_change_of_a_small_step_agree_in_sign(loop) -> None:
    """First order against measured, where the gradient was taken: the samples of the gradient stand in for those held out."""
    _, blocks, _ = loop(steps=[0.0, 0.1])
    tried = blocks[blocks.block == 2].set_index("step")
    assert tried.first_order[0.1] < tried.first_order[0.0]


def test_with_a_refresh_of_two_every_second_block_is_passed_over(loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first one, though, before which nothing is quantised: what it has is nobody else's."""
    passes, whole = [], Teacher.gradient

    def counted(self, sites, turn, ends):
        passes.append([site.block for site in sites])
        return whole(self, sites, turn, ends)

    monkeypatch.setattr(Teacher, "gradient", counted)
    monkeypatch.setattr(Teacher, "_carried_on", lambda *_: None)
    _, plain, _ = loop(sweeps=2)
    assert passes == [[2, 2], [1, 1], [2, 2]], "none where nothing is quantised yet"
    passes.clear()
    _, blocks, _ = loop(sweeps=2, refresh=2)
    assert passes == [[2, 2], [1, 1, 2, 2]]
    first = (plain.sweep == 0).sum()
    assert blocks.iloc[:first].equals(plain.iloc[:first])


@pytest.mark.parametrize(("refresh", "turns"), [(True, [2, 3, 4, 5]), (2, [1, 2])])
def test_every_gradient_is_of_the_next_minibatch(loop, refresh, turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop that goes on, too: sweep and block say whose turn it is; the first sweep, without gradients, counts."""
    taken, whole = [], Teacher.gradient
    monkeypatch.setattr(Teacher, "gradient", lambda self, sites, turn, _: taken.append(turn) or whole(self, sites, turn))
    settings = dict(start="rounded", sweeps=2, refresh=refresh, minibatches=2)
    _, table, _ = loop(**settings)
    assert taken == turns
    taken.clear()
    stopped = Stopping()
    stopped.room = 2 + len(turns) // 2  # what is rounded first, and of the first sweep its gradients and first block
    with pytest.raises(KeyboardInterrupt):
        loop(finished=stopped, **settings)
    taken.clear()
    _, blocks, _ = loop(finished=dict(stopped), **settings)
    assert taken
    assert taken == turns[-len(taken) :]
    assert blocks.equals(table)


def test_a_block_that_its_minibatch_does_not_reach_takes_another_ones(loop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole = [], Teacher.gradients

    def none_at_first(self, blocks, turn):
        asked.append(turn)
        for block, gradient in whole(self, blocks, turn):
            yield block, {site: g * (len(asked) > 1) for site, g in gradient.items()}

    monkeypatch.setattr(Teacher, "gradients", none_at_first)
    settings = dict(start="rounded", refresh=True)
    loop(**settings, minibatches=2)
    assert asked == [2, 0, 3]
    asked.clear()
    with pytest.raises(UserError, match="gradient is zero"):
        loop(**settings, minibatches=1)
    assert asked == [2]


class Stopping(dict):
    """Finished blocks of a loop that is stopped when it wants to add one more than `room`."""

    room = 1

    def __setitem__(self, name, value):
        if len(self) == self.room:
            raise KeyboardInterrupt
        super().__setitem__(name, value)


@pytest.mark.parametrize("start", [dict(sweeps=2), dict(start="rounded"), dict(start="rounded", steps=[0.0, 1.0])])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_loop_that_was_stopped_goes_on_to_the_same_bits(loop, room, start, tmp_path) -> None:
    """Stopped at every place in two sweeps, with gradients of several blocks taken together, and read back from files; behind a
    block that no step has made better too."""
    settings = dict(refresh=2, steps=[0.0, 0.1]) | start
    whole, table, _ = loop(**settings)
    stopped = Stopping()
    stopped.room = room
    with pytest.raises(KeyboardInterrupt):
        loop(finished=stopped, **settings)
    journal = Journal(tmp_path / "journal", "code")
    journal.update(stopped)
    rounded, blocks, _ = loop(finished=Journal(tmp_path / "journal", "code"), **settings)
    assert blocks.equals(table)
    for site in loop.sites:
        assert torch.equal(rounded.decoded[site], whole.decoded[site])
        assert rounded.stored[site].tensors().keys() == whole.stored[site].tensors().keys()
        assert all(torch.equal(t, whole.stored[site].tensors()[role]) for role, t in rounded.stored[site].tensors().items())


class Forgetting(dict):
    """A folder that gradients could not be written to."""

    def __setitem__(self, name, value):
        if "gradient" not in name:
            super().__setitem__(name, value)


def test_a_gradient_that_could_not_be_kept_is_told_where_memory_is_scarce(loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another one would be taken, at other weights."""
    settings = dict(start="rounded", refresh=2)
    _, table, _ = loop(**settings)
    kept = Forgetting()
    _, blocks, _ = loop(finished=kept, **settings)
    assert blocks.equals(table)
    assert not [name for name in kept if "gradient" in name]
    monkeypatch.setattr(InModel, "streamed", True)
    with pytest.raises(SharedFault, match=r"gradient-.* cannot be read back"):
        loop(finished=Forgetting(), **settings)
