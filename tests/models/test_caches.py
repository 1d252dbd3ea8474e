"""Caches of decoding: what a step and a change of beams copy, and what they leave where it is."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, EncoderDecoderCache

from tcopilot.models.caches import RoomyLayer, with_room
from tcopilot.models.static_decoding import fill_cache, static_cache


def states(rows=2, columns=1, seed=0):
    return torch.randn(2, rows, 3, columns, 4, generator=torch.Generator().manual_seed(seed)).unbind(0)


def grown(cache, steps):
    for seed in range(steps):
        cache.update(*states(seed=seed, columns=5 if seed == 0 else 1), layer_idx=0)
    return cache.layers[0]


@pytest.mark.parametrize("change", ["none", "repeat", "select", "reorder", "crop", "crop all"])
@torch.no_grad()
def test_it_holds_what_a_stock_cache_holds(change):
    layers = []
    for cache in (with_room(DynamicCache()), DynamicCache()):
        layer = grown(cache, 40)
        if change == "repeat":
            cache.batch_repeat_interleave(2)
            for seed in (7, 8):
                cache.update(*states(rows=4, seed=seed), layer_idx=0)
                cache.reorder_cache(torch.tensor([1, 1, 2, 3]))
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            cache.update(*states(rows=3, seed=9), layer_idx=0)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.update(*states(seed=9), layer_idx=0)
        elif change == "crop":
            cache.crop(-3)
            cache.update(*states(seed=9), layer_idx=0)
        elif change == "crop all":
            cache.crop(-layer.get_seq_length())
            for seed in (7, 8, 9):
                cache.update(*states(seed=seed), layer_idx=0)
        layers.append(layer)
    roomy, stock = layers
    assert isinstance(roomy, RoomyLayer)
    assert torch.equal(roomy.keys, stock.keys)
    assert torch.equal(roomy.values, stock.values)


@torch.no_grad()
def test_a_step_writes_its_own_column_only():
    cache = with_room(DynamicCache())
    layer = grown(cache, 2)
    place = layer.keys.data_ptr()
    for seed in range(60):
        cache.update(*states(seed=seed), layer_idx=0)
    assert layer.keys.data_ptr() == place
    assert layer.get_seq_length() == 66


@torch.no_grad()
def test_beams_move_no_column_that_is_equal_in_all_of_them():
    cache = with_room(DynamicCache())
    layer = grown(cache, 1)
    cache.batch_repeat_interleave(2)
    cache.update(*states(rows=4, seed=1), layer_idx=0)
    layer.keys[:, :, :5] = torch.arange(4.0).view(4, 1, 1, 1)  # tells rows apart where real ones are equal
    last = layer.keys[:, :, 5].clone()
    cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
    assert layer.keys[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(layer.keys[:, :, 5], last[[1, 0, 3, 3]])


def test_a_gradient_flows_through_a_growing_cache():
    cache = with_room(DynamicCache())
    given = [states(seed=seed)[0].requires_grad_() for seed in range(3)]
    for keys in given:
        out, _ = cache.update(keys * 2, keys, layer_idx=0)
        (out**2).sum().backward(retain_graph=True)
    assert all(keys.grad is not None for keys in given)


def test_steps_with_and_without_gradients_may_take_turns():
    roomy, stock = with_room(DynamicCache()), DynamicCache()
    for seed, with_gradients in enumerate((False, False, True, False, False)):
        with torch.set_grad_enabled(with_gradients):
            for cache in (roomy, stock):
                cache.update(*states(seed=seed), layer_idx=0)
    assert torch.equal(roomy.layers[0].keys, stock.layers[0].keys)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [[1], [0, 0, 1, 1]])
def test_a_reorder_may_change_the_number_of_rows(chosen):
    roomy, stock = with_room(DynamicCache()), DynamicCache()
    for cache in (roomy, stock):
        cache.update(*states(seed=0), layer_idx=0)
        cache.update(*states(seed=1), layer_idx=0)
        cache.reorder_cache(torch.tensor(chosen))
    assert torch.equal(roomy.layers[0].keys, stock.layers[0].keys)


def test_sliding_windows_and_other_caches_stay_what_they_are(tiny_pilot):
    cache = with_room(DynamicCache(config=tiny_pilot("gemma2", sliding_window=4).config))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, RoomyLayer] * 2


def test_a_static_cache_takes_over_both_parts_and_hides_what_was_there():
    cache = with_room(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    cache.self_attention_cache.update(*states(columns=3), layer_idx=0)
    cache.cross_attention_cache.update(*states(columns=6), layer_idx=0)
    static = static_cache(cache, room=2, memory_room=0, block=4)
    own, memory = static.self_attention_cache.layers[0], static.cross_attention_cache.layers[0]
    own.keys.fill_(torch.nan)
    fill_cache(static, cache)
    assert (own.keys.shape[2], memory.keys.shape[2]) == (8, 8)
    assert torch.equal(own.keys[:, :, :3], cache.self_attention_cache.layers[0].keys)
    assert own.keys.isfinite().all()
    assert (int(own.get_seq_length()), int(memory.get_seq_length())) == (3, 6)
    assert static.is_updated == {0: True}
