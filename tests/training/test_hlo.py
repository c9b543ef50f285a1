import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from nha_jax.training import hlo

# ruff: noqa: E501
MODULE = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gather_fusion (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (state: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %state = (s32[], f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[16,8]{1,0} get-tuple-element(%state), index=1
  %all-reduce.2 = f32[16,8]{1,0} all-reduce(%x), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %both = (s32[], f32[16,8]{1,0}) tuple(%next, %all-reduce.2)
}

%condition (state.1: (s32[], f32[16,8])) -> pred[] {
  %state.1 = (s32[], f32[16,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (arg: bf16[4,8], start: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %arg = bf16[4,8]{1,0} parameter(0)
  %start = (s32[], f32[16,8]{1,0}) parameter(1)
  %first = bf16[16,8]{1,0} fusion(%arg), kind=kCustom, calls=%gather_fusion
  %again = bf16[16,8]{1,0:S(1)} fusion(%arg), kind=kCustom, calls=%gather_fusion
  ROOT %loop = (s32[], f32[16,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_collectives_count_loops_and_each_channel_once():
    found = {c.kind: c for c in hlo.collectives(MODULE)}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.size, gather.group, gather.count) == (16 * 8 * 2, 4, 2)
    assert gather.sent == 2 * 256 * 3 / 4
    assert (reduce.size, reduce.group, reduce.count) == (16 * 8 * 4, 4, 5)
    assert reduce.sent == 5 * 512 * 2 * 3 / 4


def test_traffic_leaves_out_what_stays_on_the_chip():
    fusions = (64 + 256) + 64  # the second one writes to VMEM
    loop = 5 * (512 + 512 + 3 * 4)  # all-reduce, and the counter's addition
    compare = 5 * (1 + 4 + 4)
    assert hlo.hbm_bytes(MODULE) == fusions + loop + compare


def test_traced_products_count_loops_shards_and_recomputation():
    weights = jnp.zeros((8, 8))
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(w, x):
        many = jax.lax.scan(jax.checkpoint(layer), x, jnp.stack([w] * 3))[0]
        split = jax.shard_map(
            lambda x: x @ x.T @ x,
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
        )
        return (many**2).sum() + split(x).sum()

    x = jnp.zeros((4, 8))
    one = 2 * 4 * 8 * 8
    shards = 2 * (2 * 2 * 2 * 8 + 2 * 2 * 2 * 8)
    forward = jax.make_jaxpr(loss)(weights, x).jaxpr
    assert hlo.traced_flops(forward) == 3 * one + shards
    backward = jax.make_jaxpr(jax.grad(loss))(weights, x).jaxpr
    # forward, again for the checkpoint, and both gradients, of which the first layer's x has one
    assert hlo.traced_flops(backward) == pytest.approx(3 * 4 * one, rel=0.4)
