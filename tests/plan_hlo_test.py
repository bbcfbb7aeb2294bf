"""What is read from the text of a compiled program."""

from train.hlo import Exchange, Program

# A loop of three steps that gathers, sums and sends, and outside of it one sum. One gather is in two parts.
TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gathering (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %w = bf16[4,8]{1,0} constant({...})
  %start = ((bf16[4,8]), bf16[16,8]) async-start(%w), calls=%gathering
  %done = bf16[16,8]{1,0} async-done(%start), calls=%gathering
  %scatter = f32[2]{0} reduce-scatter(%x), channel_id=2, dimensions={0}, to_apply=%add
  %send = (f32[8], f32[8]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1}}
  %sent = f32[8]{0} collective-permute-done(%send)
  %product = f32[8]{0} fusion(%sent), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"500"}
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %product)
}

%fused (f: f32[8]) -> f32[8] {
  %f = f32[8]{0} parameter(0)
  ROOT %t = f32[8]{0} tanh(%f), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (m: f32[8]) -> f32[8] {
  %m = f32[8]{0} parameter(0)
  %state = (s32[], f32[8]{0}) tuple(%zero, %m)
  %loop = (s32[], f32[8]{0}) while(%state), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %total = (f32[8], f32[]) all-reduce(%y, %one), channel_id=4, to_apply=%add, metadata={"estimated_cycles":"40"}
}
"""
GATHERED, SCATTERED, SENT, SUMMED = 16 * 8 * 2, 8 * 4, 8 * 4, 9 * 4


def test_collectives_count_as_often_as_their_loop_runs():
    assert Program(TEXT).collectives() == {
        "all-gather": Exchange(3, 3 * GATHERED),
        "reduce-scatter": Exchange(3, 3 * SCATTERED),
        "collective-permute": Exchange(3, 3 * SENT),
        "all-reduce": Exchange(1, SUMMED),
    }


def test_a_loop_that_says_how_often_it_runs():
    said = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Program(said).collectives()["reduce-scatter"] == Exchange(5, 5 * SCATTERED)


def test_parts_of_one_collective_are_one():
    twice = TEXT.replace("%sent = f32[8]{0} collective-permute-done", "%again = f32[8]{0} collective-permute")
    twice = twice.replace(
        "%again = f32[8]{0} collective-permute(%send)", "%again = f32[8]{0} collective-permute(%x), channel_id=3"
    )
    assert Program(twice).collectives()["collective-permute"] == Exchange(3, 3 * SENT)
    other = twice.replace("collective-permute(%x), channel_id=3", "collective-permute(%x), channel_id=5")
    assert Program(other).collectives()["collective-permute"] == Exchange(6, 6 * SENT)
    # All of a `shard_map` have one channel.
    named = twice.replace("permute(%x), channel_id=3", 'permute(%x), channel_id=3, metadata={op_name="shard_map/send"}')
    assert Program(named).collectives()["collective-permute"] == Exchange(6, 6 * SENT)


def test_cycles_of_a_fusion_are_its_own():
    assert Program(TEXT).cycles() == 3 * 500 + 40
    assert Program(TEXT.replace("estimated_cycles", "cycles")).cycles() == 0
    assert Program(TEXT.replace('"500"', '"9223372036854775807"')).cycles() == 0  # it does not know


def test_of_branches_the_cheapest_counts():
    rare = "  %y = f32[8]{0} conditional(%one, %m, %m), branch_computations={%fused, %gathering}\n"
    both = TEXT.replace("  %y = f32[8]{0} get-tuple-element(%loop), index=1\n", rare)
    assert Program(both).cycles() == Program(TEXT).cycles()
    assert Program(both.replace("%gathering}", "%fused}")).cycles() == Program(TEXT).cycles() + 7
