"""The streamed Gram of the inputs equals one taken sample by sample, whatever the batches and their order."""

import torch

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.curvature.input import Input
from mgvq.evaluation.tasks.tiny_vqa import documents
from mgvq.model.encode import batches, encode
from mgvq.model.sites import list_sites


def draw():
    return TinyVQA(num_images=3, questions_per_image=4, heldout_images=1, seed=0).draw()


def test_gram_is_the_sum_over_unpadded_tokens_of_each_modality(loaded) -> None:
    examples, sites = draw().examples, list_sites(loaded.model, "all")
    bank = Input().collect(loaded.model, sites, batches(loaded.processor, examples, 5))
    chosen = [s for s in sites if s.kind in ("q_proj", "down_proj", "fc2", "linear_1")]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        loaded.model.get_submodule(s.name).register_forward_hook(lambda _, x, __, n=s.name: seen.update({n: x[0]}))
        for s in chosen
    ]
    expected = {(s, m): torch.zeros(s.in_features, s.in_features, dtype=torch.float64) for s in chosen for m in ("image", "text")}
    tokens = dict.fromkeys(expected, 0)
    with torch.no_grad():
        for example in examples:  # one at a time: no padding at all
            batch = encode(loaded.processor, [example])
            loaded.model(**batch.inputs)
            for s in chosen:
                inputs = seen[s.name].double()
                image = batch.image_mask if s.tower == "language" else torch.ones(inputs.shape[:-1], dtype=torch.bool)
                for modality, mask in (("image", image), ("text", ~image)):
                    part = inputs[mask]
                    expected[s, modality] += part.T @ part
                    tokens[s, modality] += len(part)
    for hook in hooks:
        hook.remove()
    for (s, modality), gram in expected.items():
        assert bank[s].num_tokens[modality] == tokens[s, modality], (s.name, modality)
        torch.testing.assert_close(bank[s].gram[modality], gram, rtol=1e-5, atol=1e-5 * gram.abs().max().item() + 1e-12)


def test_batches_and_order_do_not_matter(loaded) -> None:
    examples, sites = list(draw().examples), list_sites(loaded.model, "language")
    one = Input().collect(loaded.model, sites, batches(loaded.processor, examples, 2))
    other = Input().collect(loaded.model, sites, batches(loaded.processor, examples[::-1], 12))
    for s in sites:
        moment = one[s].second_moment()
        torch.testing.assert_close(other[s].second_moment(), moment, rtol=1e-6, atol=1e-6 * moment.abs().max().item())
        assert torch.linalg.eigvalsh(moment).min() > -1e-9


def test_calibration_heldout_and_test_share_no_picture() -> None:
    drawn = TinyVQA(num_images=20, questions_per_image=2, heldout_images=10, seed=0).draw()
    parts = [{e.image.tobytes() for e in drawn.examples}, {e.image.tobytes() for e in drawn.heldout_examples},
             {d["image"].tobytes() for d in documents(0, 100)}]  # fmt: skip
    assert [len(p) for p in parts[:2]] == [20, 10]
    assert len(set.union(*parts)) == sum(map(len, parts))
