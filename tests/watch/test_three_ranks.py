"""Data, randomness and control on three ranks: told as on two, and silent where it is right."""

import pytest

from tests.corpus.score import CORPUS, score_script

WRONG = [
    "clipped_before_own_reduction",
    "lingbot_vla_41_same_noise",
    "longlive_71_seed_per_rank",
    "metric_learning_10_gathered_without_gradient",
    "norm_summed_over_ranks",
    "parallelwavegan_177_set_epoch",
    "pytorch_25162_padding_counted",
    "rsl_rl_226_observation_normalizer",
    "trl_254_early_stop_per_rank",
]
RIGHT = ["early_stop_agreed", "evaluations_that_count_each_sample_once", "same_numbers_that_may_be"]


@pytest.mark.parametrize("script", [*(f"wrong/{name}" for name in WRONG), *(f"right/{name}" for name in RIGHT)])
def test_a_script_is_judged_on_three_ranks_as_on_two(launcher, tmp_path, script):
    original = CORPUS / f"{script}.py"
    copy = tmp_path / original.name
    copy.write_text(f"{original.read_text()}\n# ranks: 3\n")
    score = score_script(copy, launcher=launcher)
    assert score.good, score
