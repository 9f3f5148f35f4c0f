"""Reading an optimised program's text: values counted by hand."""
# ruff: noqa: E501 (lines of a compiler)

import pytest

from dalle2_jax.aot.hlo import Program

TEXT = """HloModule m, entry_computation_layout={()->f32[]}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_slice (p: f32[10,4,8], i: s32[]) -> f32[4,8] {
  %p = f32[10,4,8]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %flat = f32[4,8]{1,0} bitcast(%slice)
}

%all-reduce-scatter.1 (x: f32[16,8]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %r = f32[16,8]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %place = s32[] constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%r, %place, %place), dynamic_slice_sizes={4,8}
}

%condition (s: (s32[], f32[10,4,8])) -> pred[] {
  %s = (s32[], f32[10,4,8]) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(10)
  ROOT %less = pred[] compare(%n, %end), direction=LT
}

%body (s: (s32[], f32[10,4,8])) -> (s32[], f32[10,4,8]) {
  %s = (s32[], f32[10,4,8]) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %stack = f32[10,4,8]{2,1,0} get-tuple-element(%s), index=1
  %x = f32[4,8]{1,0} fusion(%stack, %n), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"100"}
  %w = bf16[8,8]{1,0} constant({...})
  %d = f32[4,8]{1,0:T(8,128)S(1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = f32[16,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %q = f32[4,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %next = (s32[], f32[10,4,8]) tuple(%n, %stack)
}

ENTRY %main (stack: f32[10,4,8], image: bf16[2,8,8,3]) -> f32[] {
  %stack = f32[10,4,8]{2,1,0} parameter(0)
  %image = bf16[2,8,8,3]{3,2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[10,4,8]) tuple(%zero, %stack)
  %loop = (s32[], f32[10,4,8]) while(%start), condition=%condition, body=%body
  %kernel = bf16[3,3,3,5]{3,2,1,0} constant({...})
  %c = bf16[2,8,8,5]{3,2,1,0} convolution(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %alone = f32[] all-reduce(%zero), replica_groups={{0},{1}}, to_apply=%sum
  %sent = (bf16[2,8,8,5], bf16[2,8,8,5]) collective-permute-start(%c), source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[] constant(0)
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(TEXT)


def test_flops_count_a_loop_as_often_as_it_runs(program):
    dot = 2 * 4 * 8 * 8
    taps = (3 * 8 - 2) ** 2  # the padding meets no input
    conv = 2 * taps * 2 * 5 * 3
    assert program.flops() == 10 * dot + conv
    assert program.flops_once() == dot + conv


def test_collectives_are_weighed_by_what_a_chip_sends(program):
    found = {c.kind: c for c in program.collectives()}
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"}  # none of one chip
    gather = found["all-gather"]
    assert (gather.group, gather.times, gather.sent) == (4, 10, 3 * 4 * 8 * 4)
    scatter = found["reduce-scatter"]
    assert (scatter.times, scatter.sent) == (10, 16 * 8 * 4 * 3 // 4)
    permute = found["collective-permute"]
    assert permute.sent == 2 * 8 * 8 * 5 * 2
    assert permute.is_async and not gather.is_async


def test_a_chain_of_fusions_is_one_collective_that_overlaps(program):
    """As the TPU compiler writes what it sends while it computes: three times, sent once."""
    gather = next(line for line in TEXT.splitlines() if " all-gather(" in line)
    first = gather.replace("dimensions", 'frontend_attributes={chain_id="7"}, dimensions')
    again = first.replace("%g =", "%again =")
    assert len({gather, first, again}) == 3
    once, many = program.collectives(), Program(TEXT.replace(gather, f"{first}\n{again}"))
    assert len(many.collectives()) == len(once)
    for before, now in zip(once, many.collectives(), strict=True):
        assert now == before._replace(is_async=before.is_async or before.kind == "all-gather")


def test_cycles_leave_sentinels_out_and_count_them(program):
    assert program.cycles() == (1000, 1)


def test_traffic_of_a_slice_is_that_of_the_slice(program):
    x, d = 4 * 8 * 4, 0  # d lies in vector memory
    slice_in_loop = 4 + 2 * x  # the index, the slice, the result
    dot = x + 8 * 8 * 2 + d
    scatter = 16 * 8 * 4 + 4 * 8 * 4
    conv = 2 * (2 * 64 * 3 + 9 * 3 * 5 + 2 * 64 * 5)
    assert program.hbm_bytes() == 10 * (slice_in_loop + dot + scatter) + conv + _scalars()


def _scalars() -> int:
    return 10 * (4 + 4 + 1)  # the condition's comparison


def test_the_time_of_a_loop_is_that_of_its_other_runs(program):
    seconds = program.loop_seconds(flops=1e12, bandwidth=1e3)
    in_body = program.hbm_bytes() - 2 * (2 * 64 * 3 + 9 * 3 * 5 + 2 * 64 * 5)
    assert seconds == pytest.approx(0.9 * in_body / 1e3)


def test_a_slice_within_a_fusion_within_a_fusion_is_a_slice(program):
    fused = TEXT[TEXT.index("%fused_slice") : TEXT.index("%all-reduce-scatter.1")]
    outer = """%outer (q: f32[10,4,8], j: s32[]) -> f32[4,8] {
  %q = f32[10,4,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %r = f32[10,4,8]{2,1,0} bitcast(%q)
  ROOT %inner = f32[4,8]{1,0} fusion(%r, %j), kind=kLoop, calls=%fused_slice
}

"""
    text = TEXT.replace(fused, fused + outer).replace(
        "fusion(%stack, %n), kind=kLoop, calls=%fused_slice",
        "fusion(%stack, %n), kind=kLoop, calls=%outer",
    )
    assert Program(text).hbm_bytes() == program.hbm_bytes()


def test_kernels_are_seen():
    assert not Program(TEXT).calls_kernels
    text = TEXT.replace("%alone = f32[] all-reduce", "%alone = f32[] custom-call").replace(
        "replica_groups={{0},{1}}", 'custom_call_target="tpu_custom_call"'
    )
    assert Program(text).calls_kernels


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4,'c'=3] {'a','c'}", 6),
    ],
)
def test_groups_in_every_notation(groups, size):
    text = TEXT.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    gather = next(c for c in Program(text).collectives() if c.kind == "all-gather")
    assert gather.group == size
