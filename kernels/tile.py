"""How a row of logits is cut: whole vectors of 16 bytes, in tiles, and a few logits at both ends.

A row begins wherever its vocabulary and stride put it, and a GPU loads 16 bytes at once only from
an address that 16 divides. So a row that is not ALIGNED has a head, the logits before its first
such address, and a rest, those after its last whole vector; together fewer than two vectors.

A tile is (TILES, THREADS, vector): each thread loads TILES vectors, and neighbours in a row are
neighbours in a warp.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(ptr, own, stride, ALIGNED: tl.constexpr):
    """Where a row begins; the compiler is told if 16 divides that address."""
    row_ptr = ptr + own * stride
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)
    return row_ptr


@triton.jit
def split_row(row_ptr, V, ALIGNED: tl.constexpr):
    """Logits in the head, and logits in whole vectors after it."""
    BITS: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // BITS
    head = V * 0
    if not ALIGNED:
        past = (row_ptr.to(tl.int64) & 15).to(tl.int32)
        head = tl.minimum(((16 - past) & 15) // (BITS // 8), V)
    return head, (V - head) // VECTOR * VECTOR


@triton.jit
def on_boundary(row_ptr, head, ALIGNED: tl.constexpr):
    """Where the whole vectors begin, at an address that 16 divides."""
    if not ALIGNED:
        row_ptr = tl.multiple_of(row_ptr + head, 16)
    return row_ptr


@triton.jit
def tile_offsets(TILES: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    tile = tl.arange(0, TILES)[:, None, None] * (THREADS * VECTOR)
    thread = tl.arange(0, THREADS)[None, :, None] * VECTOR
    return tile + thread + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def is_whole(start, count, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Which threads' vectors from `start` on are among the row's: one answer a vector."""
    return start + tl.arange(0, THREADS)[None, :, None] * VECTOR < count


@triton.jit
def pairs(words):
    """Two bfloat16 of a word as float32: an instruction each, where a conversion takes three."""
    even = (words << 16).to(tl.float32, bitcast=True)
    odd = (words & -65536).to(tl.float32, bitcast=True)
    both = tl.join(even, odd)
    return tl.reshape(both, [words.shape[0], words.shape[1], 2 * words.shape[2]])


@triton.jit
def values(words, dtype: tl.constexpr):
    """The logits of words as they lie in memory, in float32."""
    if dtype == tl.bfloat16:
        return pairs(words)
    elif dtype == tl.float16:
        even = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        both = tl.join(even, odd)
        return tl.reshape(both, [words.shape[0], words.shape[1], 2 * words.shape[2]])
    else:
        return words.to(tl.float32, bitcast=True)


@triton.jit
def load_words(ptr, TILES: tl.constexpr, THREADS: tl.constexpr, POLICY: tl.constexpr):
    """A tile as it lies in memory, at an address that 16 divides: four words of each vector."""
    words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words_ptr + tile_offsets(TILES, THREADS, 4), eviction_policy=POLICY)


@triton.jit
def is_in_row(count, TILES: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Which vectors are among the row's, in a tile that is as long as the row or longer."""
    tile = tl.arange(0, TILES)[:, None, None] * (THREADS * VECTOR)
    return tile + tl.arange(0, THREADS)[None, :, None] * VECTOR < count


@triton.jit
def load_row(row_ptr, V, ALIGNED: tl.constexpr, TILES: tl.constexpr, THREADS: tl.constexpr):
    """All whole vectors of a row as they lie in memory; logits of -inf behind its last."""
    BITS: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth
    head, count = split_row(row_ptr, V, ALIGNED)
    words_ptr = on_boundary(row_ptr, head, ALIGNED).to(tl.pointer_type(tl.int32), bitcast=True)
    masked = -8388608
    if row_ptr.dtype.element_ty == tl.bfloat16:  # two of -inf
        masked = -8323200
    elif row_ptr.dtype.element_ty == tl.float16:
        masked = -67044352
    inside = is_in_row(count, TILES, THREADS, 128 // BITS)
    offsets = tile_offsets(TILES, THREADS, 4)
    return tl.load(words_ptr + offsets, mask=inside, other=masked, eviction_policy="evict_first")


@triton.jit
def load_tile(
    ptr, TILES: tl.constexpr, THREADS: tl.constexpr, POLICY: tl.constexpr, WIDE: tl.constexpr = True
):
    """A tile in float32; WIDE says that 16 divides its address."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    if WIDE and ptr.dtype.element_ty == tl.bfloat16:
        words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        offsets = tile_offsets(TILES, THREADS, VECTOR // 2)
        return pairs(tl.load(words_ptr + offsets, eviction_policy=POLICY))
    offsets = tile_offsets(TILES, THREADS, VECTOR)
    return tl.load(ptr + offsets, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def load_last(ptr, inside, THREADS: tl.constexpr, POLICY: tl.constexpr, WIDE: tl.constexpr = True):
    """One vector a thread, -inf where there is none."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    if WIDE and ptr.dtype.element_ty == tl.bfloat16:
        words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        offsets = tile_offsets(1, THREADS, VECTOR // 2)
        # Two of -inf.
        words = tl.load(words_ptr + offsets, mask=inside, other=-8323200, eviction_policy=POLICY)
        return pairs(words)
    offsets = tile_offsets(1, THREADS, VECTOR)
    x = tl.load(ptr + offsets, mask=inside, other=float("-inf"), eviction_policy=POLICY)
    return x.to(tl.float32)


@triton.jit
def ends(head, count, V, VECTOR: tl.constexpr):
    """Places of the logits in head and rest, and which lanes have one."""
    lane = tl.arange(0, 2 * VECTOR)
    at = tl.where(lane < VECTOR, lane, head + count + lane - VECTOR)
    return at, tl.where(lane < VECTOR, lane < head, at < V)


@triton.jit
def fill_zero(out_ptr, V, ALIGNED: tl.constexpr, THREADS: tl.constexpr):
    """The gradient of a row that takes no part."""
    VECTOR: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    head, count = split_row(out_ptr, V, ALIGNED)
    whole_ptr = on_boundary(out_ptr, head, ALIGNED)
    offsets = tile_offsets(1, THREADS, VECTOR)
    zero = tl.zeros([1, THREADS, VECTOR], out_ptr.dtype.element_ty)
    for start in range(0, count, THREADS * VECTOR):
        inside = is_whole(start, count, THREADS, VECTOR)
        tl.store(whole_ptr + start + offsets, zero, mask=inside)
    if not ALIGNED:
        at, inside = ends(head, count, V, VECTOR)
        tl.store(out_ptr + at, tl.zeros([2 * VECTOR], out_ptr.dtype.element_ty), mask=inside)
