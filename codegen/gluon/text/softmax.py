"""What happens to the scores of a block: masks, and the online softmax."""

SOFTMAX = '''\
@gluon.jit
def exp2(x):
    """2 to the power of x, as fast as the processor has it."""
    return gl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def packed(weight):
    """Weights in half precision, two neighbours in an int32: so they cross the edge of a loop."""
    even, odd = gl.split(gl.reshape(weight, [ROWS, KEYS // 2, 2]))
    return gl.inline_asm_elementwise(
        PACK, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpacked(pairs, dtype: gl.constexpr):
    """What :func:`packed` made, as an operand in registers."""
    even = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(even, odd), [ROWS, KEYS]), WEIGHTS)


@gluon.jit
def shrunk(out, shrink):
    """The output, after a peak grew."""
    return out * gl.convert_layout(shrink, OF_OUTPUT)[:, None]


@gluon.jit
def release(barrier):
    """Every thread arrives for itself, which waits for no other: no copies are under way."""
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def following(stage, phase):
    """The next place of a ring, and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def masked(score, first, kv0, b, h, sizes):
    """Scores of a PARTIAL block from key ``kv0`` on, for queries from ``first`` on."""
    $SIZES = sizes
    $COORDINATES
    $MASKING
    return score


@gluon.jit
def softmax_step(score, peak, total, scale, PARTIAL: gl.constexpr):
    """Online softmax. Peaks are of raw products, so an exponent is one multiply-add.

    Returns the weights of this block, by how much earlier sums shrink, the new peak and total.
    """
    new_peak = gl.maximum(peak, gl.max(score, 1))
    reference = new_peak
    if PARTIAL:
        # A query that has met no key yet: -inf - -inf would be NaN.
        reference = gl.where(new_peak == NOTHING, 0.0, new_peak)
    reference *= scale
    weight = exp2(score * scale - gl.expand_dims(reference, 1))
    shrink = gl.exp2(peak * scale - reference)
    partial = gl.sum(gl.reshape(weight, [ROWS, KEYS // 8, 8]), 1)
    total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
    return weight, shrink, new_peak, total + gl.convert_layout(partial, SUMS)
'''
