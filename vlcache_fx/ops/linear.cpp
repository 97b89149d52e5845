// Few bfloat16 rows times an unpacked weight matrix.
//
// With up to FEW rows, the product takes as long as reading the weights once in order; PyTorch reads them in tiles, at
// about half the bandwidth. With more rows, PyTorch packs the weights in every call, which takes about as long as
// multiplying them with thirty rows. This kernel packs the few rows instead and computes the transposed product.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

namespace {

using bf16 = at::BFloat16;

constexpr int64_t FEW = 6;
constexpr int64_t MAX_ROWS = 80;
constexpr int64_t LINES = 32;  // weight rows per task

#ifdef __AVX512BF16__

constexpr int64_t PAIR = 64;  // values in two registers; two chains of sums hide the latency of one

__m512bh load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

__m512bh load_first(const bf16* from, int64_t count) {
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from);
}

// out[r][j] = sum over i of rows[r][i] * weight[j][i], plus bias[j]; sums in float32.
template <int ROWS>
void multiply(const bf16* rows, const bf16* weight, const bf16* bias, bf16* out, int64_t first, int64_t last,
              int64_t width, int64_t outputs) {
  for (int64_t j = first; j < last; ++j) {
    const bf16* line = weight + j * width;
    __m512 even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + PAIR <= width; i += PAIR) {
      const __m512bh a = load(line + i), b = load(line + i + PAIR / 2);
      for (int r = 0; r < ROWS; ++r) {
        even[r] = _mm512_dpbf16_ps(even[r], a, load(rows + r * width + i));
        odd[r] = _mm512_dpbf16_ps(odd[r], b, load(rows + r * width + i + PAIR / 2));
      }
    }
    for (; i < width; i += PAIR / 2) {
      const int64_t count = std::min(width - i, PAIR / 2);
      const __m512bh a = load_first(line + i, count);
      for (int r = 0; r < ROWS; ++r) even[r] = _mm512_dpbf16_ps(even[r], a, load_first(rows + r * width + i, count));
    }
    for (int r = 0; r < ROWS; ++r) {
      const float sum = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
      out[r * outputs + j] = bf16(bias == nullptr ? sum : sum + float(bias[j]));
    }
  }
}

using Multiply = decltype(&multiply<1>);
constexpr Multiply MULTIPLY[FEW] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

constexpr int64_t LANES = 16;       // rows per register of sums
constexpr int64_t CACHE_LINE = 32;  // values
constexpr int64_t BLOCK = 2048;     // part of the width: MAX_ROWS rows of this length stay in the L2 cache

// Rows [count, width] -> pairs along the even width: [width / 2][lanes][2], padded with zero rows.
void pack_rows(const bf16* rows, int64_t count, int64_t width, int64_t lanes, bf16* packed) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < width; i += 2) {
    for (int64_t r = 0; r < lanes; ++r) {
      for (int64_t k = 0; k < 2; ++k) packed[i * lanes + 2 * r + k] = r < count ? rows[r * width + i + k] : bf16(0.f);
    }
  }
}

// sums[j][r] += weight[j] . rows[r], for WEIGHTS weight rows and VECTORS * LANES packed rows, over an even number of
// values, ``length``. Prefetches the next WEIGHTS weight rows.
template <int VECTORS, int WEIGHTS>
void add_block(const bf16* packed, const bf16* weight, int64_t width, int64_t length, float* sums) {
  __m512 found[WEIGHTS][VECTORS];
  for (int j = 0; j < WEIGHTS; ++j) {
    for (int v = 0; v < VECTORS; ++v) found[j][v] = _mm512_load_ps(sums + (j * VECTORS + v) * LANES);
  }
  for (int64_t i = 0; i < length; i += CACHE_LINE) {
    for (int j = 0; j < WEIGHTS; ++j)
      _mm_prefetch(reinterpret_cast<const char*>(weight + (WEIGHTS + j) * width + i), _MM_HINT_T0);
    const int64_t end = std::min(length, i + CACHE_LINE);
    for (int64_t k = i; k < end; k += 2) {
      __m512bh rows[VECTORS];
      for (int v = 0; v < VECTORS; ++v) rows[v] = load(packed + (k * VECTORS + 2 * v) * LANES);
      for (int j = 0; j < WEIGHTS; ++j) {
        int32_t pair;
        std::memcpy(&pair, weight + j * width + k, sizeof(pair));
        const auto both = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < VECTORS; ++v) found[j][v] = _mm512_dpbf16_ps(found[j][v], rows[v], both);
      }
    }
  }
  for (int j = 0; j < WEIGHTS; ++j) {
    for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(sums + (j * VECTORS + v) * LANES, found[j][v]);
  }
}

// Transposes the 16 x 16 matrix in sixteen registers.
void transpose(__m512 (&rows)[LANES]) {
  __m512 pairs[LANES], fours[LANES];
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    for (int c = 0; c < 2; ++c) {
      const __m512d x = _mm512_castps_pd(pairs[i + c]), y = _mm512_castps_pd(pairs[i + 2 + c]);
      fours[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      fours[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const __m512 even_after = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512 odd_after = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(even, even_after, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(odd, odd_after, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even, even_after, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd, odd_after, 0xdd);
  }
}

// out[r][j] = sums[j][r] + bias[j], for ``count`` rows and weight rows ``first`` to ``last``.
void write(const float* sums, int64_t lanes, const bf16* bias, bf16* out, int64_t count, int64_t first, int64_t last,
           int64_t outputs) {
  for (int64_t j = first; j < last; j += LANES) {
    const auto there = static_cast<__mmask16>((1u << std::min(LANES, last - j)) - 1);
    const __m512 added = bias == nullptr ? _mm512_setzero_ps() : _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias + j)), 16));
    for (int64_t r = 0; r < count; r += LANES) {
      __m512 block[LANES];
      for (int64_t i = 0; i < LANES; ++i) block[i] = _mm512_load_ps(sums + (j - first + i) * lanes + r);
      transpose(block);
      for (int64_t i = 0; i < std::min(LANES, count - r); ++i)
        _mm256_mask_storeu_epi16(out + (r + i) * outputs + j, there,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(block[i], added)));
    }
  }
}

// Like ``multiply``, for the first ``count`` of VECTORS * LANES packed rows and at most LINES weight rows.
template <int VECTORS, int WEIGHTS>
void multiply_packed(const bf16* packed, int64_t count, const bf16* weight, const bf16* bias, bf16* out, int64_t first,
                     int64_t last, int64_t width, int64_t outputs) {
  constexpr int64_t lanes = VECTORS * LANES;
  alignas(64) float sums[LINES * lanes] = {};
  for (int64_t i = 0; i < width; i += BLOCK) {
    const int64_t length = std::min(BLOCK, width - i);
    int64_t j = first;
    for (; j + WEIGHTS <= last; j += WEIGHTS)
      add_block<VECTORS, WEIGHTS>(packed + i * lanes, weight + j * width + i, width, length, sums + (j - first) * lanes);
    for (; j < last; ++j)
      add_block<VECTORS, 1>(packed + i * lanes, weight + j * width + i, width, length, sums + (j - first) * lanes);
  }
  write(sums, lanes, bias, out, count, first, last, outputs);
}

using MultiplyPacked = decltype(&multiply_packed<1, 1>);
constexpr MultiplyPacked MULTIPLY_PACKED[MAX_ROWS / LANES] = {
    multiply_packed<1, 8>, multiply_packed<2, 8>, multiply_packed<3, 8>,
    multiply_packed<4, 4>, multiply_packed<5, 4>};

#endif

}  // namespace

// Returns whether the compiler targets a processor with AVX-512 BF16.
extern "C" int vlcache_linear_is_supported() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// rows [count, width], weight [outputs, width], bias (or null) [outputs] -> out [count, outputs], all dense;
// count is 1 to MAX_ROWS; above FEW, width must be even.
extern "C" void vlcache_linear(const bf16* rows, const bf16* weight, const bf16* bias, bf16* out, int64_t count,
                               int64_t width, int64_t outputs) {
#ifdef __AVX512BF16__
  const int64_t vectors = (count + LANES - 1) / LANES, lanes = vectors * LANES;
  const bool is_packed = count > FEW;
  const std::unique_ptr<bf16[]> packed(is_packed ? new bf16[width * lanes] : nullptr);
#pragma omp parallel
  {
    if (is_packed) pack_rows(rows, count, width, lanes, packed.get());
#pragma omp for schedule(static)
    for (int64_t task = 0; task < (outputs + LINES - 1) / LINES; ++task) {
      const int64_t first = task * LINES, last = std::min(outputs, first + LINES);
      if (is_packed) {
        MULTIPLY_PACKED[vectors - 1](packed.get(), count, weight, bias, out, first, last, width, outputs);
      } else {
        MULTIPLY[count - 1](rows, weight, bias, out, first, last, width, outputs);
      }
    }
  }
#endif
}
