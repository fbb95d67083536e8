import math
from dataclasses import replace

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import LLAMA3, gpt

from megapref.batch import TokenPair
from megapref.convert.families import FAMILIES, to_spec
from megapref.data.packing import pack
from megapref.plan.memory import HEAD_CHUNK, KEPT_LOGITS_BYTES, Memory, layer_activations, memory, packs_in_flight, stage_activations, stage_memory
from megapref.plan.shapes import Layout, Sizes, buffer_size, num_parameters, shard_sizes, stage_layers
from megapref.plan.workload import Job, PackSizes, PairLengths, rank_packs, spread, total

SPECS = {name: to_spec(config) for name, config in tiny_models.CONFIGS.items()}
LENGTHS = st.builds(PairLengths, st.integers(1, 60), st.integers(1, 60), st.integers(0, 60))
MEMORY_LAYOUTS = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4, 8]),
    data=st.sampled_from([1, 2, 4]),
    sequence=st.booleans(),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
PACK = PackSizes(tokens=4096, trained=2048, key_rows=5000, scores=6_000_000, masked=2_000_000)


# parameters


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_parameters_are_those_of_transformers(name):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    options = dict(tiny_models.CONFIGS[name])
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[options.pop("model_type")](**options))
    assert num_parameters(SPECS[name]) == sum(parameter.numel() for parameter in model.parameters())


def test_every_family_has_a_tiny_model_here():
    assert {spec.family for spec in SPECS.values()} == set(FAMILIES)


@pytest.mark.parametrize(("size", "published"), [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)])
def test_parameters_are_the_published_ones(size, published):
    assert num_parameters(LLAMA3[size]) == published


@given(name=st.sampled_from(sorted(SPECS)), tensor=st.sampled_from([1, 2]), pipeline=st.sampled_from([1, 2]))
def test_shards_and_stages_add_up_to_the_model(name, tensor, pipeline):
    spec, layout = SPECS[name], Layout(tensor, pipeline)
    total_of = sum(tensor * num_parameters(spec, layout, stage) for stage in range(pipeline))
    copies = [num for stage in range(pipeline) for key, num in shard_sizes(spec, layout, stage) if spec.weights[key][0] == "replicated"]
    padding = (spec.padded_vocab_size(tensor) - spec.vocab_size) * spec.transformer["hidden_size"] * (1 if spec.tied else 2)
    tied = spec.padded_vocab_size(tensor) * spec.transformer["hidden_size"] if spec.tied and pipeline > 1 else 0
    assert total_of - (tensor - 1) * sum(copies) - padding - tied == num_parameters(spec)


def test_what_has_no_shape_or_split_is_named():
    spec = SPECS["llama"]
    with pytest.raises(ValueError, match=r"mlp.gate.weight"):
        num_parameters(replace(spec, weights={"decoder.layers.{layer}.mlp.gate.weight": ("replicated", ())}))
    with pytest.raises(ValueError, match="'experts'"):
        num_parameters(replace(spec, weights={"decoder.layers.{layer}.mlp.linear_fc1.weight": ("experts", ())}))


@pytest.mark.parametrize(("layers", "stages", "expected"), [(8, 4, [2, 2, 2, 2]), (126, 16, [7, *[8] * 14, 7]), (5, 3, None), (1, 3, None)])
def test_layers_of_stages(layers, stages, expected):
    assert stage_layers(layers, stages) == expected
    assert expected is None or sum(expected) == layers


# what stays, against the table of Megatron Core's guide to its distributed optimizer: 6 + 12 / d and 8 + 8 / d bytes per parameter


@pytest.mark.parametrize("data", [1, 8, 64])
@pytest.mark.parametrize(("dtype", "shared", "sharded"), [("bf16", 6, 12), ("fp32", 8, 8)])
def test_bytes_per_parameter_are_those_of_megatron_cores_guide(data, dtype, shared, sharded):
    job = Job((PairLengths(10, 10, 10),), dtype=dtype, reference="none")
    m = stage_memory(LLAMA3["8B"], job, Layout(data=data), [PACK], "fused", 0)
    per_parameter = (m.weights + m.gradients + m.optimizer) / num_parameters(LLAMA3["8B"])
    assert per_parameter == pytest.approx(shared + sharded / data, rel=1e-6)


@pytest.mark.parametrize(("changes", "per_parameter"), [
    ({}, 6 + 12),
    ({"gradients": "bf16"}, 4 + 12),
    ({"moments": "bf16"}, 6 + 8),
    ({"moments": "fp8"}, 6 + 6),
    ({"offload": 0.75}, 6 + 3),
    ({"fp8": True, "fp8_weights": True}, 6 + 12),  # FP8 and its transpose are as many bytes as bf16
])
def test_types_and_offloading_change_what_a_parameter_takes(changes, per_parameter):
    m = stage_memory(LLAMA3["8B"], Job((PairLengths(10, 10, 10),), reference="none", **changes), Layout(), [PACK], "fused", 0)
    assert (m.weights + m.gradients + m.optimizer) / num_parameters(LLAMA3["8B"]) == pytest.approx(per_parameter, rel=1e-6)


def test_fp8_keeps_copies_of_bf16_weights_and_smaller_inputs_of_products():
    spec, pair = LLAMA3["8B"], (PairLengths(10, 10, 10),)
    matrices = num_parameters(spec) - (2 * 128256 + 65) * 4096  # embedding, head, norms
    plain, fp8, lean = (
        stage_memory(spec, Job(pair, **changes), Layout(), [PACK], "fused", 0)
        for changes in ({}, {"fp8": True}, {"fp8": True, "fp8_weights": True, "fp8_reference": True})
    )
    assert (fp8.weights - plain.weights, fp8.reference - plain.reference) == (2 * matrices, matrices)
    assert (lean.weights - plain.weights, lean.reference - plain.reference) == (0, -matrices)
    saved = plain.activations - fp8.activations
    whole = 32 * (2 * 4096 + 4096 + 14336) * PACK.tokens  # a byte of each product's input: of two norms, attention, gate
    assert saved == whole - (4096 + 14336) * (PACK.tokens - PACK.trained)  # the last MLP sees fewer rows


# activations, against table 2 of arXiv:2205.05198, in bytes per token and hidden unit: 34 unsplit, 10 + 24 / t, 34 / t with sequence
# parallelism, 2 with full recomputation. Two of the 34 are masks of dropout, of which preference training has none.


@pytest.mark.parametrize(
    ("layout", "published"),
    [
        (Layout(), 34 - 2),
        (Layout(8), 10 - 2 + 24 / 8),
        (Layout(8, sequence=True), (34 - 2) / 8),
        (Layout(8, recompute="full"), 2),
        (Layout(8, sequence=True, recompute="full"), 2 / 8),
    ],
)
def test_activations_are_those_of_korthikanti(layout, published):
    hidden, heads = 12288, 96
    m = Sizes.of(gpt(hidden, 96, heads))
    pack = PackSizes(2048, 2048, 2048, 2048 * 2049 // 2, 0)
    saved = layer_activations(m, Job((PairLengths(1, 1, 0),)), layout, pack, "fused")
    statistics = 4 * heads / layout.tensor + 16 / (layout.tensor if layout.sequence else 1)  # float32, of softmax and norms; not in the paper
    if layout.recompute == "full":
        statistics = 0
    assert saved / 2048 == pytest.approx(published * hidden + statistics, rel=1e-12)


def test_activations_are_those_of_megatron_lms_own_estimate():
    """theoretical_memory_usage.py: 18 + 4 ffn / hidden bytes per token and hidden unit, two of them masks of dropout; divided by t."""
    m = Sizes.of(gpt(4096, 32, 32))
    saved = layer_activations(replace(m, ffn=3 * 4096), Job((PairLengths(1, 1, 0),)), Layout(4, sequence=True), PACK, "fused")
    extra = 2 * 2 * (PACK.key_rows - PACK.tokens) * 4096 / 4  # keys and values gathered twice, where a prompt is shared
    statistics = PACK.tokens * (4 * 32 + 16) / 4
    assert saved - extra - statistics == pytest.approx(PACK.tokens * 4096 * (18 - 2 + 4 * 3) / 4, rel=1e-12)


def test_packs_in_flight_are_those_of_one_forward_one_backward():
    assert [packs_in_flight(Layout(pipeline=4), 100, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [packs_in_flight(Layout(pipeline=4), 2, stage) for stage in range(4)] == [2, 2, 2, 1]
    assert packs_in_flight(Layout(pipeline=8, virtual_pipeline=4), 100, 0) == 8 * (1 + 7 / (8 * 4))  # arXiv:2205.05198, section 4.2.3


@given(layout=MEMORY_LAYOUTS, kernels=st.sampled_from(["torch", "fused"]), reference=st.sampled_from(["resident", "swapped", "none"]))
def test_totals_are_sums_and_memory_falls_with_more_ranks(layout, kernels, reference):
    spec, job = LLAMA3["8B"], Job((PairLengths(100, 100, 100),), reference=reference)
    if layout.sequence and layout.tensor == 1:
        layout = replace(layout, sequence=False)

    def of(layout: Layout) -> Memory:
        return memory(spec, job, layout, [PACK] * 64, kernels)

    m = of(layout)
    assert m.fixed == m.weights + m.gradients + m.optimizer + m.reference + m.tables
    assert m.total == m.fixed + max(m.activations + m.logits, m.kv_cache)
    assert (m.reference > 0) == (reference == "resident")
    if layout.tensor < 8:
        assert of(replace(layout, tensor=2 * layout.tensor)).total < m.total
        assert of(replace(layout, tensor=2 * layout.tensor, sequence=True)).activations < m.activations
    assert of(replace(layout, data=2 * layout.data)).optimizer < m.optimizer
    assert of(replace(layout, pipeline=2 * layout.pipeline)).fixed < m.fixed
    recomputed = [replace(layout, recompute=recompute) for recompute in ("full", "selective", "none")]
    held = [stage_activations(Sizes.of(spec), job, each, PACK, 64, kernels, 0) for each in recomputed]
    assert held == sorted(held)
    assert of(replace(layout, data=2 * layout.data)).weights == pytest.approx(m.weights, rel=1e-6)


def test_memory_is_of_the_stage_that_needs_most():
    spec, job = LLAMA3["70B"], Job((PairLengths(100, 100, 100),))
    for layout in (Layout(8, 8), Layout(8, 4, sequence=True), Layout(8, 10, recompute="full")):
        stages = [stage_memory(spec, job, layout, [PACK] * 64, "torch", stage) for stage in range(layout.pipeline)]
        assert memory(spec, job, layout, [PACK] * 64, "torch").total == max(m.total for m in stages)


def test_generation_and_training_take_turns_in_memory():
    spec, pairs = LLAMA3["8B"], (PairLengths(100, 100, 100),)
    little = memory(spec, Job(pairs, prompts=1, kv_cache=1.0), Layout(), [PACK], "torch")
    much = memory(spec, Job(pairs, prompts=1, kv_cache=1e12), Layout(), [PACK], "torch")
    assert little.total == little.fixed + little.activations + little.logits and much.total == much.fixed + 1e12
    assert memory(spec, Job(pairs, kv_cache=1e12), Layout(), [PACK], "torch").kv_cache == 0


def test_head_chunk_is_that_of_the_forward_pass():
    from megapref.mcore import forward

    assert (forward.HEAD_CHUNK, forward.KEPT_LOGITS_BYTES) == (HEAD_CHUNK, KEPT_LOGITS_BYTES)


def test_buffers_are_padded_as_core_pads_them():
    from megatron.core.optimizer.param_layout import pad_bucket_end, pad_param_start

    for name, data in (("qwen2", 3), ("llama", 2), ("qwen3", 1)):
        end = 0
        for _, size in shard_sizes(SPECS[name], Layout(data=data), 0):
            end = pad_param_start(end) + size
        assert buffer_size(SPECS[name], Layout(data=data), 0) == pad_bucket_end(end, data, False)


# what is computed


@settings(deadline=None)
@given(pairs=st.lists(LENGTHS, min_size=1, max_size=12), ranks=st.integers(1, 3), share=st.booleans(), multiple=st.sampled_from([1, 4]))
def test_packs_are_those_of_packing(pairs, ranks, share, multiple):
    job = Job(tuple(pairs), max_tokens=300, share_prompt=share)
    rows = [TokenPair([0] * p.prompt, [0] * p.first, [0] * p.second) for p in pairs]
    packed = pack(rows, max_tokens=300, num_ranks=ranks, share_prompt=share, pad_multiple=multiple)
    heaviest = max(packed, key=lambda packs: sum(len(b.token_ids_T) - b.num_padding for b in packs))
    predicted = rank_packs(job, ranks, multiple)
    assert [p.tokens for p in predicted] == [len(batch.token_ids_T) for batch in heaviest]
    assert [p.trained for p in predicted] == [len(batch.target_ids_K) for batch in heaviest]
    for p, batch in zip(predicted, heaviest, strict=True):
        query, prefix = batch.segments_S[:, 1], batch.segments_S[:, 3]
        assert p.key_rows == int((query + prefix).sum())
        assert p.scores == int((query * prefix + query * (query + 1) // 2).sum())


def test_a_pair_that_fits_in_no_pack():
    with pytest.raises(ValueError, match=r"a pair of 300 tokens is longer than a pack of 296; raise pack.max_tokens"):
        rank_packs(Job((PairLengths(100, 100, 100),), max_tokens=299), 1, 8)


@given(entries=st.lists(st.tuples(LENGTHS, st.floats(0, 10)), min_size=1, max_size=6), count=st.integers(1, 50))
def test_spread_follows_the_histogram(entries, count):
    weights = math.fsum(weight for _, weight in entries)
    if weights == 0:
        with pytest.raises(ValueError, match="weights"):
            spread(entries, count)
        return
    drawn = spread(entries, count)
    assert len(drawn) == count
    for lengths in {lengths for lengths, _ in entries}:
        share = math.fsum(weight for other, weight in entries if other == lengths) / weights
        assert abs(drawn.count(lengths) - share * count) <= len(entries) + 1e-6


def test_total_is_the_sum_of_each_number():
    assert total([PackSizes(1, 2, 3, 4, 5), PackSizes(10, 20, 30, 40, 50)]) == PackSizes(11, 22, 33, 44, 55)
