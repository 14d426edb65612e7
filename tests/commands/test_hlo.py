"""Collectives in a TPU's program, as text; tests/models/test_sharding.py reads one of eight devices.

Lines of the program are as the compiler writes them.
"""
# ruff: noqa: E501

from utils.commands import hlo

PROGRAM = """HloModule jit_step, is_scheduled=true

%started (p.1: bf16[4,8]) -> bf16[32,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, dimensions={0}
}

%overlapped (p.2: bf16[4,8]) -> bf16[32,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=1, dimensions={0}
}

%condition (p.3: (s32[], f32[16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28)
  %p.3 = (s32[], f32[16]) parameter(0)
  ROOT %lt = pred[] compare(%p.3, %constant.1), direction=LT
}

%body (p.4: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p.4 = (s32[], f32[16]{0:T(256)}) parameter(0)
  %fusion.1 = bf16[32,8]{1,0} fusion(%p.4), kind=kCustom, calls=%started
  %fusion.2 = bf16[32,8]{1,0} fusion(%p.4), kind=kCustom, calls=%overlapped
  ROOT %all-reduce.1 = (f32[16]{0:T(256)}, f32[4,4]{1,0}) all-reduce(%p.4, %p.4), channel_id=2, to_apply=%sum
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %while.1 = (s32[], f32[16]{0:T(256)}) while(%p), condition=%condition, body=%body, metadata={op_name="x"}
  %permute = (u8[4]{0}, u8[4]{0}, u32[]) collective-permute-start(%p), channel_id=3
  %done = u8[4]{0} collective-permute-done(%permute)
  ROOT %scatter = f32[2]{0} reduce-scatter(%p), channel_id=4, to_apply=%sum
}
"""


def test_collectives_are_counted_as_often_as_their_loop_runs():
    assert hlo.collectives(PROGRAM) == {
        "all-gather": {
            "count": 28,
            "bytes": 28 * 32 * 8 * 2,
        },  # overlapped with two computations, counted once
        "all-reduce": {"count": 28, "bytes": 28 * (16 + 16) * 4},
        "reduce-scatter": {"count": 1, "bytes": 8},
        "collective-permute": {"count": 1, "bytes": 4},
    }
    assert hlo.collectives("") == {}
