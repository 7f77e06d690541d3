"""The list-wise language model against enumeration and plain forward passes without a cache."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag.config import EnvironmentConfig, SelectorConfig
from rlrag.errors import CheckpointError, ConfigError, PromptTooLongError
from rlrag.files.directories import load_weights, save_weights
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.branches import lay_out, read_branches, read_prompts
from rlrag.selection.build import build_policy
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.selection.listwise_prompt import RankingPrompt, Rankings

MAX_TOKENS = 12
TOLERANCE = 1e-5
CHAT = (
    "{% for message in messages %}<|end|>{{ message['role'] }}: {{ message['content'] }}"
    "{% endfor %}<|end|>assistant: "
)
WORDS = np.array(["isle", "port", "fish", "king", "rain", "1834", "tower", "salt", "ridge"])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("listwise") / "plain")


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory) -> Path:
    path = save_tiny_llama(tmp_path_factory.mktemp("listwise") / "chat")
    (path / "chat_template.jinja").write_text(CHAT)
    return path


@pytest.fixture(scope="module")
def policy(model_dir) -> ListwiseLMPolicy:
    return ListwiseLMPolicy(model_dir, 2, MAX_TOKENS)


@pytest.fixture(scope="module")
def plain_model(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def make_batch(num_questions: int, num_candidates: int, seed: int = 0) -> CandidateBatch:
    """Questions and passages of many lengths."""
    rng = np.random.default_rng(seed)

    def phrase(longest: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    return CandidateBatch(
        question_texts=tuple(f"what is {phrase(9)}?" for _ in range(num_questions)),
        passage_texts=tuple(
            tuple(f"{phrase(3)}\n{phrase(12)}" for _ in range(num_candidates))
            for _ in range(num_questions)
        ),
        scores_BNC=np.zeros((num_questions, num_candidates, 1), dtype=np.float32),
        question_vectors_BD=np.zeros((num_questions, 0), dtype=np.float32),
        passage_vectors_BND=np.zeros((num_questions, num_candidates, 0), dtype=np.float32),
    )


def rows_of(batch: CandidateBatch, rows: list[int]) -> CandidateBatch:
    return CandidateBatch(
        tuple(batch.question_texts[row] for row in rows),
        tuple(batch.passage_texts[row] for row in rows),
        batch.scores_BNC[rows],
        batch.question_vectors_BD[rows],
        batch.passage_vectors_BND[rows],
    )


def all_selections(num_candidates: int, num_selected: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(num_candidates), num_selected)))


def written(tokenizer, picks) -> tuple[int, ...]:
    """Token ids of a ranking as it stands behind a plain prompt."""
    pieces = [f" [{picks[0] + 1}]", *(f" > [{pick + 1}]" for pick in picks[1:])]
    return tuple(
        token
        for piece in pieces
        for token in tokenizer(piece, add_special_tokens=False)["input_ids"]
    )


def naive_logp(plain_model, tokenizer, prompt: list[int], picks, num_candidates: int) -> float:
    """Token by token, each read from the beginning; what may follow is found by enumeration."""
    possible = [written(tokenizer, p) for p in all_selections(num_candidates, len(picks))]
    target, total = written(tokenizer, picks), 0.0
    for place, token in enumerate(target):
        allowed = sorted({p[place] for p in possible if p[:place] == target[:place]})
        with torch.no_grad():
            logits = plain_model(torch.tensor([[*prompt, *target[:place]]])).logits[0, -1]
        total += logits[allowed].log_softmax(dim=0)[allowed.index(token)].item()
    return total


@pytest.mark.parametrize(("num_candidates", "num_selected"), [(4, 2), (4, 4), (11, 1), (11, 2)])
def test_probabilities_of_all_selections_sum_to_one(policy, num_candidates, num_selected):
    selections = all_selections(num_candidates, num_selected)
    batch = make_batch(2, num_candidates)
    with torch.no_grad():
        logp = episodes.log_prob(policy, batch, np.tile(selections, (2, 1, 1)))
    assert logp.shape == (2, math.perm(num_candidates, num_selected))
    assert logp.double().exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_in_bfloat16_it_is_a_distribution_near_that_in_float32(policy, model_dir):
    half = ListwiseLMPolicy(model_dir, policy.num_selected, MAX_TOKENS, precision="bfloat16")
    batch = make_batch(2, 4)
    selections = np.tile(all_selections(4, policy.num_selected), (2, 1, 1))
    exact, rounded = (
        episodes.log_prob(policy, batch, selections),
        episodes.log_prob(half, batch, selections),
    )
    assert rounded.dtype == torch.float32
    assert rounded.double().exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.2)
    rounded[0, 0].backward()
    grads = [p.grad for p in half.parameters() if p.grad is not None]
    assert grads
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("num_candidates", [4, 11])
def test_log_prob_equals_reading_token_by_token(
    policy, plain_model, tokenizer, model_dir, num_candidates
):
    batch = make_batch(3, num_candidates)
    positions = np.array([[[0, 1], [3, 0]], [[2, 3], [2, 1]], [[1, 0], [1, 0]]])
    if num_candidates > 10:
        positions[:, 0, 1], positions[0, 1, 0] = 9, 10  # [10] and [11] begin as [1] does
    prompts = RankingPrompt(model_dir, MAX_TOKENS, 2)
    with torch.no_grad():
        found = episodes.log_prob(policy, batch, positions)
    for b, m in itertools.product(range(3), range(2)):
        prompt = prompts.encode(batch.question_texts[b], batch.passage_texts[b])
        expected = naive_logp(plain_model, tokenizer, prompt, positions[b, m], num_candidates)
        assert found[b, m].item() == pytest.approx(expected, abs=TOLERANCE)


def test_a_number_of_one_token_has_its_softmax_probability_by_hand(
    policy, plain_model, tokenizer, model_dir
):
    """With n = 3, K = 1 the probabilities are a softmax over the tokens 1, 2, 3 behind ' ['."""
    batch = make_batch(1, 3)
    prompt = RankingPrompt(model_dir, MAX_TOKENS, 2).encode(
        batch.question_texts[0], batch.passage_texts[0]
    )
    opening = tokenizer(" [", add_special_tokens=False)["input_ids"]
    digits = tokenizer.convert_tokens_to_ids(["1", "2", "3"])
    with torch.no_grad():
        logits = plain_model(torch.tensor([[*prompt, *opening]])).logits[0, -1, digits]
    single = ListwiseLMPolicy(model_dir, 1, MAX_TOKENS)
    single._prompt = RankingPrompt(model_dir, MAX_TOKENS, 2)  # the same prompt, one pick of it
    found = episodes.log_prob(single, batch, np.array([[[0], [1], [2]]])).exp()
    assert np.allclose(found.detach()[0], logits.softmax(0), atol=TOLERANCE)


def test_greedy_takes_the_most_probable_candidate_at_each_pick(policy):
    batch, selections = make_batch(4, 11), all_selections(11, 2)
    with torch.no_grad():
        p = episodes.log_prob(policy, batch, np.tile(selections, (4, 1, 1))).exp().numpy()
    found = episodes.greedy(policy, batch)
    for b in range(4):
        first = max(range(11), key=lambda n: p[b, selections[:, 0] == n].sum())
        second = np.where(selections[:, 0] == first, p[b], -1).argmax()
        assert found[b].tolist() == selections[second].tolist()


def test_greedy_ties_keep_the_candidates_order(model_dir):
    flat = ListwiseLMPolicy(model_dir, 3, MAX_TOKENS)
    torch.nn.init.zeros_(flat.model.lm_head.weight)
    assert episodes.greedy(flat, make_batch(2, 5)).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_draws_have_their_exact_frequencies_and_weights(policy, temperature):
    """Observed counts by chi-square; weighted draws estimate the policy's own probabilities."""
    batch, selections, num_samples = make_batch(1, 4), all_selections(4, 2), 4000
    drawn = episodes.sample(policy, batch, num_samples, [7], temperature=temperature)
    with torch.no_grad():
        p = episodes.log_prob(policy, batch, selections[None]).double().exp().numpy()[0]
    first = np.array([p[selections[:, 0] == n].sum() for n in range(4)])
    tempered_first = first ** (1 / temperature) / (first ** (1 / temperature)).sum()
    second = p / first[selections[:, 0]]
    power = second ** (1 / temperature)
    sums = np.array([power[selections[:, 0] == n].sum() for n in range(4)])
    q = tempered_first[selections[:, 0]] * power / sums[selections[:, 0]]
    counts = Counter(map(tuple, drawn.positions_BMK[0].tolist()))
    observed = np.array([counts[tuple(s)] for s in selections.tolist()])
    usual = q * num_samples >= 5
    chi = ((observed - q * num_samples)[usual] ** 2 / (q * num_samples)[usual]).sum()
    assert chi < 31.3  # the 0.999 quantile of chi-square with 11 degrees of freedom
    expected = np.log(p / q / num_samples)
    index = {tuple(s): i for i, s in enumerate(selections.tolist())}
    rows = [index[tuple(z)] for z in drawn.positions_BMK[0].tolist()]
    assert np.allclose(drawn.log_weights_BM[0], expected[rows], atol=1e-4)
    weights = np.exp(drawn.log_weights_BM[0])
    error = num_samples * weights.std() / math.sqrt(num_samples)
    assert abs(weights.sum() - 1) <= 4 * error + 1e-6


@pytest.mark.parametrize("num_candidates", [5, 11])
def test_sampled_logp_is_log_prob_of_the_same_selections(policy, num_candidates):
    batch = make_batch(3, num_candidates)
    drawn = episodes.sample(policy, batch, 6, [1, 2, 3], temperature=1.7)
    assert all(len(set(z)) == 2 for z in drawn.positions_BMK.reshape(-1, 2).tolist())
    with torch.no_grad():
        logp = episodes.log_prob(policy, batch, drawn.positions_BMK).numpy()
    assert np.allclose(drawn.logp_BM, logp, atol=TOLERANCE)


def test_batch_and_micro_batch_change_nothing(policy, model_dir):
    batch, seeds = make_batch(5, 6), [[0, b] for b in range(5)]
    whole = episodes.sample(policy, batch, 4, seeds)
    small = ListwiseLMPolicy(model_dir, 2, MAX_TOKENS, micro_batch=2)
    parts = episodes.sample(small, batch, 4, seeds)
    assert np.array_equal(whole.positions_BMK, parts.positions_BMK)
    assert np.allclose(whole.logp_BM, parts.logp_BM, atol=TOLERANCE)
    with torch.no_grad():
        logp = episodes.log_prob(policy, batch, whole.positions_BMK)
        reversed_ = episodes.log_prob(
            policy, rows_of(batch, [4, 3, 2, 1, 0]), whole.positions_BMK[::-1]
        )
    assert torch.allclose(logp, reversed_.flip(0), atol=TOLERANCE)
    for b in range(5):
        alone = episodes.sample(policy, rows_of(batch, [b]), 4, [seeds[b]])
        assert np.array_equal(alone.positions_BMK[0], whole.positions_BMK[b])
        assert np.array_equal(
            episodes.greedy(policy, rows_of(batch, [b]))[0], episodes.greedy(policy, batch)[b]
        )


def test_a_seed_repeats_and_two_differ(policy):
    batch = rows_of(make_batch(1, 6), [0, 0, 0])
    drawn = episodes.sample(policy, batch, 16, [1, 1, 2]).positions_BMK
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    fewer = episodes.sample(policy, batch, 4, [1, 1, 2]).positions_BMK
    assert np.array_equal(fewer, drawn[:, :4])


def test_edges_of_log_prob(policy, model_dir):
    single = ListwiseLMPolicy(model_dir, 1, MAX_TOKENS)
    batch = make_batch(2, 1)
    certain = episodes.log_prob(single, batch, np.zeros((2, 3, 1), dtype=np.int64))
    assert certain.tolist() == [[0.0] * 3] * 2
    certain.sum().backward()
    assert episodes.sample(single, batch, 2, [0, 1]).positions_BMK.tolist() == [[[0]] * 2] * 2


def test_gradient_of_log_prob_by_finite_differences(model_dir):
    """Several samples share the prompt: the gradient flows through what they share."""
    double = ListwiseLMPolicy(model_dir, 2, MAX_TOKENS).double()
    batch = make_batch(2, 4)
    positions = np.array([[[0, 1], [2, 3], [0, 1]], [[3, 1], [3, 0], [1, 2]]])
    weights = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.3, -0.7]], dtype=torch.float64)

    def objective() -> torch.Tensor:
        return (weights * episodes.log_prob(double, batch, positions)).sum()

    objective().backward()
    step = 3e-3  # Llama normalises in float32, which would drown a smaller one
    for name in ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.0.self_attn.v_proj"):
        weight = double.get_parameter(f"model.model.{name}.weight")
        place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
        values = []
        with torch.no_grad():
            for change in (step, -2 * step):
                weight[place] += change
                values.append(objective().item())
            weight[place] += step
        numeric = (values[0] - values[1]) / (2 * step)
        assert weight.grad[place].item() == pytest.approx(numeric, rel=1e-3)


def test_gradient_equals_that_of_reading_each_sample_alone(policy, model_dir):
    batch, positions = make_batch(2, 4), np.array([[[0, 1], [2, 3]], [[3, 1], [3, 0]]])
    alone, shared = copy.deepcopy(policy), copy.deepcopy(policy)
    episodes.log_prob(shared, batch, positions).sum().backward()
    for b, m in itertools.product(range(2), range(2)):
        episodes.log_prob(
            alone, rows_of(batch, [b]), positions[b : b + 1, m : m + 1]
        ).sum().backward()
    for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-3, rtol=1e-3)


def test_branches_read_as_if_each_stood_alone(plain_model):
    prompts = [list(range(30, 50)), list(range(60, 67))]
    paths = [{(), (5, 6), (5, 6, 7), (9,)}, {(8, 8, 8)}]
    with torch.no_grad():
        read = read_prompts(plain_model, prompts)
        for _ in range(2):  # reading branches leaves the prompts as they were
            logits, columns = read_branches(plain_model, read, paths)
            for b, prompt in enumerate(prompts):
                for path in paths[b]:
                    alone = plain_model(torch.tensor([[*prompt, *path]])).logits[0, -1]
                    assert torch.allclose(logits[b, columns[b][path]], alone, atol=1e-4)
    assert lay_out([(1, 2), (1,), (1, 3)]) == ([(1, 2), (1, 3)], {(1,): 0, (1, 2): 1, (1, 3): 3})


def test_rankings_walk_through_numbers_of_several_tokens():
    """'1]' and '10]' part at the second token; a last candidate leaves nothing to choose."""
    numbers = [(91, 1, 93), (91, 2, 93), (91, 1, 0, 93)]
    rankings = Rankings(numbers, [(62, *number) for number in numbers], num_picks=3)
    begin = rankings.begin()
    assert (begin.path, rankings.options(begin)) == ((91,), (1, 2))
    after_one = rankings.follow(begin, 1)
    assert (after_one.path, rankings.options(after_one)) == ((91, 1), (93, 0))
    ten = rankings.follow(after_one, 0)
    assert (ten.picks, ten.path) == ((2,), (91, 1, 0, 93, 62, 91))
    assert rankings.options(ten) == (1, 2)
    end = rankings.follow(ten, 2)
    assert rankings.ended(end)
    assert end.picks == (2, 1, 0)
    assert [token for _, token in rankings.forks((2, 1, 0))] == [1, 0, 2]
    with pytest.raises(ConfigError, match=r"lower environment\.num_selected"):
        Rankings(numbers, numbers, num_picks=4)


def test_prompt_numbers_cut_passages_on_one_line_each(model_dir, tokenizer):
    passages = ["Isle\nthe king\nof rain", "no title " * 50]
    text = tokenizer.decode(
        RankingPrompt(model_dir, 10, 3).encode("who is the <|end|> king?", passages)
    )
    lines = text.splitlines()
    assert lines[0].startswith("Below are 2 passages")
    assert "[1] Isle: the king of rain"[:20] == lines[2][:20]
    assert lines[3].startswith("[2] no title no")
    for line in lines[2:4]:
        assert len(tokenizer(line.split("] ")[1])["input_ids"]) <= 10
    assert lines[5] == "Question: who is the <|end|> king?"
    assert "Name the 3 most useful passages" in lines[6]
    assert lines[7] == "Ranking:"


def test_a_question_cannot_hold_control_tokens(chat_dir, tokenizer):
    ids = RankingPrompt(chat_dir, 10, 3).encode("who is <|end|>?", ["a\n<|end|>", "b"])
    end = tokenizer.eos_token_id
    assert ids.count(end) == 2  # those of the chat template
    assert ids[0] == end
    assert tokenizer.decode(ids).endswith("<|end|>assistant: ")


def test_chat_policy_is_a_distribution_too(chat_dir):
    chat = ListwiseLMPolicy(chat_dir, 2, MAX_TOKENS)
    with torch.no_grad():
        logp = episodes.log_prob(chat, make_batch(1, 4), all_selections(4, 2)[None])
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_adapter_alone_is_trained_saved_and_loaded(model_dir, tmp_path):
    config = SelectorConfig(
        kind="listwise_lm",
        model=str(model_dir),
        max_tokens=MAX_TOKENS,
        adapter_rank=4,
        precision="float32",
    )
    policies = [
        build_policy(config, EnvironmentConfig(num_selected=2), 1, 0, tmp_path, seed)
        for seed in (0, 0, 1)
    ]
    batch, positions = make_batch(2, 4), np.array([[[0, 1]], [[2, 3]]])
    whole = ListwiseLMPolicy(model_dir, 2, MAX_TOKENS)
    with torch.no_grad():
        before = episodes.log_prob(whole, batch, positions)
        assert torch.equal(episodes.log_prob(policies[0], batch, positions), before)
    names = set(policies[0].state_dict())
    assert names
    assert all("lora_" in name for name in names)
    assert names == {n for n, p in policies[0].named_parameters() if p.requires_grad}
    same, other = policies[1].state_dict(), policies[2].state_dict()
    assert all(torch.equal(t, same[n]) for n, t in policies[0].state_dict().items())
    assert not all(torch.equal(t, other[n]) for n, t in policies[0].state_dict().items())
    with torch.no_grad():
        for parameter in policies[0].parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        after = episodes.log_prob(policies[0], batch, positions)
    assert not torch.allclose(after, before)
    save_weights(policies[0], tmp_path / "selector.safetensors")
    load_weights(policies[2], tmp_path / "selector.safetensors")
    with torch.no_grad():
        assert torch.equal(episodes.log_prob(policies[2], batch, positions), after)
    larger = ListwiseLMPolicy(model_dir, 2, MAX_TOKENS, adapter_rank=8)
    with pytest.raises(CheckpointError):
        load_weights(larger, tmp_path / "selector.safetensors")
    with pytest.raises(CheckpointError):
        load_weights(whole, tmp_path / "selector.safetensors")


def test_all_weights_are_saved_without_an_adapter(model_dir, tmp_path):
    one, other = (ListwiseLMPolicy(model_dir, 2, MAX_TOKENS) for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(0.9)
    save_weights(one, tmp_path / "selector.safetensors")
    load_weights(other, tmp_path / "selector.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_evaluation_mode_stays(policy):
    assert not policy.train().training
    assert not policy.model.training


def test_what_cannot_work_is_refused(policy, tmp_path):
    from transformers import Lfm2Config

    encoder = save_tiny_encoder(tmp_path / "encoder")
    config = SelectorConfig(kind="listwise_lm", model=str(encoder))
    with pytest.raises(ConfigError, match=r"set selector\.model to a causal language model"):
        build_policy(config, EnvironmentConfig(), 1, 0, tmp_path, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"set selector\.model to a causal language model"):
        ListwiseLMPolicy(tmp_path / "empty", 1)
    Lfm2Config(architectures=["Lfm2ForCausalLM"], layer_types=["conv"] * 32).save_pretrained(
        tmp_path / "conv"
    )
    with pytest.raises(ConfigError, match=r"instead of a key-value cache.*set selector\.model"):
        ListwiseLMPolicy(tmp_path / "conv", 1)
    with pytest.raises(ConfigError, match="draws with replacement only"):
        episodes.sample(policy, make_batch(1, 4), 2, [0], replacement=False)
    with pytest.raises(PromptTooLongError, match=r"lower selector\.max_tokens"):
        episodes.greedy(policy, make_batch(1, 200))
