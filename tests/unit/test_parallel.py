"""How layers are cut into stages, and the numbers that follow from a layout."""

import pytest

from megapref.parallel import Parallel, SamplingParallel


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({}, [12]),
        ({"pipeline": 4}, [3, 3, 3, 3]),
        ({"pipeline": 2, "virtual_pipeline": 3}, [6, 6]),
        ({"pipeline": 2, "first_stage_layers": 5}, [5, 7]),
        ({"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 7}, [5, 7]),
        ({"pipeline": 4, "first_stage_layers": 2, "last_stage_layers": 2}, [2, 4, 4, 2]),
        ({"pipeline": 3, "last_stage_layers": 2}, [5, 5, 2]),
    ],
)
def test_layers_of_stages(layout, layers):
    assert Parallel(**layout).stage_layers(12) == layers


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"pipeline": 5}, "parallel.pipeline=5 does not divide the model's num_hidden_layers=12; use 1, 2, 3, 4, 6 or 12"),
        ({"pipeline": 24}, "parallel.pipeline=24 does not divide"),
        ({"pipeline": 3, "first_stage_layers": 3}, "less parallel.first_stage_layers=3; use other values: 9 layers are left for 2 equal stages"),
        ({"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 3}, "6 layers are left for 0 equal stages"),
        ({"pipeline": 2, "first_stage_layers": 12}, "0 layers are left for 1 equal stages"),
        ({"first_stage_layers": 2}, "parallel.first_stage_layers=2 is about stages of a pipeline, but parallel.pipeline=1"),
        ({"virtual_pipeline": 2}, "parallel.virtual_pipeline=2 is about stages of a pipeline"),
        ({"pipeline": 2, "virtual_pipeline": 4}, "parallel.virtual_pipeline=4 does not divide the 6 layers of a stage; use 1, 2, 3 or 6"),
        ({"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 8}, None),
        ({"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 3}, "does not divide the 3 layers of a stage"),
    ],
)
def test_layers_that_cannot_be_cut(layout, message):
    if message is None:
        assert sum(Parallel(**layout).stage_layers(12)) == 12
        return
    with pytest.raises(ValueError) as caught:
        Parallel(**layout).stage_layers(12)
    assert message in str(caught.value)


def test_what_packs_are_padded_to():
    assert Parallel().pad_multiple == 1 and Parallel(tensor=4).pad_multiple == 1
    assert Parallel(tensor=4, sequence=True).pad_multiple == 4
    assert Parallel(context=2).pad_multiple == 4 and Parallel(tensor=4, sequence=True, context=2).pad_multiple == 16
    assert Parallel(pipeline=4).pack_multiple == 1 and Parallel(pipeline=4, virtual_pipeline=2).pack_multiple == 4


def test_where_samples_are_made():
    as_trained, copies = SamplingParallel(), SamplingParallel(tensor=2)
    assert Parallel(tensor=4, pipeline=2).sampling_tensor(as_trained) is None
    assert Parallel(tensor=4, pipeline=2).sampling_tensor(copies) == 2
    assert Parallel(tensor=4, pipeline=2, virtual_pipeline=2).sampling_tensor(as_trained) == 4
    assert Parallel(tensor=4, context=2).sampling_tensor(as_trained) == 4
