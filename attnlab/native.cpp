// Decode attention on an x86 CPU with AVX2: each row of K and V is read once, for all R query heads of its group.
//
// A task is one (sequence, KV head, split of the context). It walks its tokens in blocks: scores of R rows against a block
// of K, an online softmax (arXiv 1805.02867, here in base 2), the block of V added by its weights. Arithmetic is float32
// whatever is stored. A split leaves maxima, sums and rows behind; they are merged at the end. `linear` is the first half
// alone, few rows times many, for 16-bit weights where the processor has no 16-bit arithmetic.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

constexpr int W = 8;  // lanes of a vector
typedef float vec __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));  // in memory, anywhere
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Tokens to a block, multiplied together, and fetched ahead, by size of element: measured, see LOG.md.
template <class T> constexpr int64_t BLOCK = 64 / sizeof(T);
template <class T> constexpr int64_t TILE = 4 / sizeof(T);
constexpr int64_t AHEAD = 4, PANEL = 64;
constexpr int ROWS_AT_ONCE = 4;  // with TILE tokens their sums, the tokens and a row fit into sixteen registers

static inline vec load(const float* p) { return *(const loose*)p; }
static inline vec load(const bf16* p) { return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16); }
static inline vec load(const fp16* p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(float* p, vec x) { *(loose*)p = x; }
static inline void store(fp16* p, vec x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
static inline void store(bf16* p, vec x) {  // to the nearest, ties to even; NaN stays NaN
  const __m256i bits = (__m256i)x, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), (__m256i)(x != x));
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

static inline float sum(vec x) {
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
}

static inline vec exp2(vec x) {  // of x <= 0: relative error below 3e-7, and 0 below -126
  const vec clipped = (vec)_mm256_max_ps(_mm256_set1_ps(-126.f), (__m256)x);  // in this order NaN stays NaN
  const __m256i whole = _mm256_cvtps_epi32((__m256)clipped);
  const vec f = clipped - (vec)_mm256_cvtepi32_ps(whole);
  vec p = f * 1.5403530e-4f + 1.3333558e-3f;
  p = ((((p * f + 9.6181291e-3f) * f + 5.5504109e-2f) * f + 2.4022651e-1f) * f + 6.9314718e-1f) * f + 1.f;
  return x < -126.f ? vec{} : (vec)_mm256_add_epi32((__m256i)p, _mm256_slli_epi32(whole, 23));
}

// out[r][t] = rows[r] . keys[t]; lines of out are BLOCK apart. With FETCH the keys after these are asked for meanwhile.
template <int ROWS, int N, bool FETCH, class T>
static inline void dots(const float* rows, int64_t size, const T* keys, int64_t step, float* out) {
  vec s[ROWS][N];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < N; t++) s[r][t] = vec{};
  for (int64_t d = 0; d < size; d += W) {
    vec k[N];
    for (int t = 0; t < N; t++) {
      k[t] = load(keys + t * step + d);
      if constexpr (FETCH) __builtin_prefetch(keys + (t + N) * step + d);
    }
    for (int r = 0; r < ROWS; r++) {
      const vec q = load(rows + r * size + d);
      for (int t = 0; t < N; t++) s[r][t] += k[t] * q;
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < N; t++) out[r * BLOCK<T> + t] = sum(s[r][t]);
}

// FEW: for so few rows that reading the keys takes longer than the products.
template <bool FEW = false, int ROWS = ROWS_AT_ONCE, class T>
static inline void scores(const float* rows, int64_t R, int64_t size, const T* keys, int64_t step, int64_t n, float* out) {
  for (; R >= ROWS; R -= ROWS, rows += ROWS * size, out += ROWS * BLOCK<T>) {
    constexpr int N = FEW ? ROWS_AT_ONCE / ROWS : TILE<T>;
    int64_t t = 0;
    for (; t + N <= n; t += N) dots<ROWS, N, FEW>(rows, size, keys + t * step, step, out + t);
    for (; t < n; t++) dots<ROWS, 1, false>(rows, size, keys + t * step, step, out + t);
  }
  if constexpr (ROWS > 1) scores<FEW, ROWS / 2>(rows, R, size, keys, step, n, out);
}

// out[r] += sum over t of weights[r][t] * values[t], VECS vectors wide
template <int ROWS, int VECS, class T>
static inline void add(const float* weights, const T* values, int64_t step, int64_t n, int64_t D, float* out) {
  vec o[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < VECS; i++) o[r][i] = load(out + r * D + i * W);
  for (int64_t t = 0; t < n; t++)
    for (int i = 0; i < VECS; i++) {
      const vec v = load(values + t * step + i * W);
      for (int r = 0; r < ROWS; r++) o[r][i] += v * weights[r * BLOCK<T> + t];
    }
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < VECS; i++) store(out + r * D + i * W, o[r][i]);
}

template <int ROWS = ROWS_AT_ONCE, class T>
static inline void mix(const float* weights, int64_t R, int64_t D, const T* values, int64_t step, int64_t n, float* out) {
  constexpr int VECS = 8 / ROWS;
  for (; R >= ROWS; R -= ROWS, weights += ROWS * BLOCK<T>, out += ROWS * D) {
    int64_t d = 0;
    for (; d + VECS * W <= D; d += VECS * W) add<ROWS, VECS>(weights, values + d, step, n, D, out + d);
    for (; d < D; d += W) add<ROWS, 1>(weights, values + d, step, n, D, out + d);
  }
  if constexpr (ROWS > 1) mix<ROWS / 2>(weights, R, D, values, step, n, out);
}

// One split: rows [R, D] are its scaled queries; state is R maxima, R sums, and R rows of output, not yet divided.
template <class T>
static void attend(const float* rows, int64_t R, int64_t D, const T* k, int64_t k_step, const T* v, int64_t v_step, int64_t S, float* weights, float* state) {
  float *top = state, *total = state + R, *out = state + 2 * R;
  std::fill(top, total, -FLT_MAX);  // not -INFINITY: a block whose scores all are would then leave NaN
  std::fill(total, out + R * D, 0.f);
  for (int64_t start = 0; start < S; start += BLOCK<T>, k += BLOCK<T> * k_step, v += BLOCK<T> * v_step) {
    const int64_t n = std::min(BLOCK<T>, S - start);
    for (int64_t t = 0; t < n; t += TILE<T>) {
      for (int64_t i = t; i < t + TILE<T>; i++)
        for (int64_t d = 0; d < D; d += 64 / sizeof(T)) {
          __builtin_prefetch(k + (i + AHEAD) * k_step + d);
          __builtin_prefetch(v + i * v_step + d);
        }
      scores(rows, R, D, k + t * k_step, k_step, std::min(TILE<T>, n - t), weights + t);
    }
    for (int64_t r = 0; r < R; r++) {
      float* w = weights + r * BLOCK<T>;
      std::fill(w + n, w + BLOCK<T>, -INFINITY);
      const float highest = std::max(top[r], *std::max_element(w, w + n)), keep = std::exp2(top[r] - highest);
      vec added = {};
      for (int64_t t = 0; t < BLOCK<T>; t += W) {
        const vec e = exp2(load(w + t) - highest);
        added += e;
        store(w + t, e);
      }
      total[r] = total[r] * keep + sum(added);
      top[r] = highest;
      for (int64_t d = 0; d < D && keep != 1.f; d += W) store(out + r * D + d, load(out + r * D + d) * keep);
    }
    mix(weights, R, D, v, v_step, n, out);
  }
}

template <class T>
static void decode(const T* q, const T* k, const T* v, T* out, float scale, const int64_t* n, int threads) {
  const int64_t B = n[0], H = n[1], G = n[2], S = n[3], D = n[4], splits = n[5], R = H / G;
  const int64_t *qs = n + 6, *ks = n + 8, *vs = n + 11;  // strides of q [B, H] and of k and v [B, G, S]
  const int64_t size = R * (D + 2), chunk = (S / splits / BLOCK<T> + 1) * BLOCK<T>;
  const int64_t own = R * D + R * BLOCK<T> + D;  // of a thread: rows, weights, a merged row
  std::vector<float> states(B * G * splits * size), scratch(threads * own);  // before the threads: only here may it fail
#pragma omp parallel num_threads(threads)
  {
    float *rows = &scratch[omp_get_thread_num() * own], *weights = rows + R * D, *merged = weights + R * BLOCK<T>;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * G * splits; task++) {
      const int64_t b = task / (G * splits), g = task / splits % G, start = task % splits * chunk;
      for (int64_t i = 0; i < R * D; i += W) store(&rows[i], load(q + b * qs[0] + (g * R + i / D) * qs[1] + i % D) * (scale * 1.44269504f));
      attend(rows, R, D, k + b * ks[0] + g * ks[1] + start * ks[2], ks[2], v + b * vs[0] + g * vs[1] + start * vs[2], vs[2],
             std::min(chunk, S - start), weights, &states[task * size]);
    }
#pragma omp for
    for (int64_t row = 0; row < B * H; row++) {
      const float* state = &states[row / R * splits * size];
      const int64_t r = row % R;
      float highest = -INFINITY, total = 0;
      for (int64_t i = 0; i < splits; i++) highest = std::max(highest, state[i * size + r]);
      std::fill(merged, merged + D, 0.f);
      for (int64_t i = 0; i < splits; i++) {
        const float keep = std::exp2(state[i * size + r] - highest), *o = state + i * size + 2 * R + r * D;
        total += keep * state[i * size + R + r];
        for (int64_t d = 0; d < D; d += W) store(&merged[d], load(&merged[d]) + keep * load(o + d));
      }
      for (int64_t d = 0; d < D; d += W) store(out + row * D + d, load(&merged[d]) / total);
    }
  }
}

template <class T>
static void linear(const T* x, const T* w, T* out, int64_t M, int64_t N, int64_t K, int threads) {
  std::vector<float> rows(std::min(M, PANEL) * K);  // as many rows at a time as a core's own cache holds
  for (; M > 0; M -= PANEL, x += PANEL * K, out += PANEL * N) {
    const int64_t m = std::min(M, PANEL);
    for (int64_t i = 0; i < m * K; i += W) store(&rows[i], load(x + i));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t n = 0; n < N; n += BLOCK<T>) {
      float block[PANEL * BLOCK<T>];
      (m < 16 ? scores<true, ROWS_AT_ONCE, T> : scores<false, ROWS_AT_ONCE, T>)(rows.data(), m, K, w + n * K, K, std::min(BLOCK<T>, N - n), block);
      for (int64_t i = 0; i < m; i++)
        for (int64_t t = 0; t < BLOCK<T> && n + t < N; t += W) store(out + i * N + n + t, load(block + i * BLOCK<T> + t));
    }
  }
}

template <class T>
static void rms_norm(const T* x, const T* weight, T* out, int64_t M, int64_t K, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t m = 0; m < M; m++) {
    vec squares = {};
    for (int64_t i = m * K; i < (m + 1) * K; i += W) squares += load(x + i) * load(x + i);
    const float scale = 1 / std::sqrt(sum(squares) / K + eps);
    for (int64_t i = 0; i < K; i += W) store(out + m * K + i, load(x + m * K + i) * scale * load(weight + i));
  }
}

// x *= 1 / (1 + exp(-x)), times up: the SwiGLU of one row [2 F], in place in its first half
template <class T>
static void swiglu(T* row, int64_t F) {
  for (int64_t i = 0; i < F; i += W) {
    const vec x = load(row + i), e = exp2((x < 0 ? x : -x) * 1.44269504f);
    store(row + i, (x < 0 ? e : vec{} + 1.f) / (1.f + e) * x * load(row + F + i));
  }
}

// A pre-norm block of one token per sequence, x [B, d] in place, as layers.py has it and rounding where it rounds. weights:
// norm, q k v [H + 2 G, D, d], o, norm, gate up [2 F, d], down; K and V are written at S - 1 and read to there.
template <class T>
static void block(T* x, const T* const* weights, const T* cos, const T* sin, T* k, T* v, const int64_t* n, float eps, int threads) {
  const int64_t B = n[0], d = n[1], H = n[2], G = n[3], D = n[4], F = n[5], S = n[6], capacity = n[7], splits = n[8], line = (H + 2 * G) * D;
  const int attending = n[9];
  std::vector<T> normed(B * d), qkv(B * line), mixed(B * H * D), gated(B * 2 * F), hidden(B * F);
  const auto onto_x = [&] {
    for (int64_t i = 0; i < B * d; i += W) store(x + i, load(x + i) + load(&normed[i]));
  };
  rms_norm(x, weights[0], normed.data(), B, d, eps, 1);
  linear(normed.data(), weights[1], qkv.data(), B, line, d, threads);
  for (int64_t b = 0; b < B; b++) {
    T* heads = &qkv[b * line];
    for (int64_t h = 0; h < H + G; h++)
      for (int64_t i = 0; i < D / 2; i += W) {
        T *left = heads + h * D + i, *right = left + D / 2;
        const vec l = load(left), r = load(right);
        store(left, l * load(cos + i) + r * load(sin + i));
        store(right, r * load(cos + D / 2 + i) + l * load(sin + D / 2 + i));
      }
    for (int64_t g = 0; g < G; g++) {
      std::copy_n(heads + (H + g) * D, D, k + ((b * G + g) * capacity + S - 1) * D);
      std::copy_n(heads + (H + G + g) * D, D, v + ((b * G + g) * capacity + S - 1) * D);
    }
  }
  const int64_t sizes[] = {B, H, G, S, D, splits, line, D, G * capacity * D, capacity * D, D, G * capacity * D, capacity * D, D};
  decode(qkv.data(), k, v, mixed.data(), 1 / std::sqrt((float)D), sizes, attending);
  linear(mixed.data(), weights[2], normed.data(), B, d, H * D, threads);
  onto_x();
  rms_norm(x, weights[3], normed.data(), B, d, eps, 1);
  linear(normed.data(), weights[4], gated.data(), B, 2 * F, d, threads);
  for (int64_t b = 0; b < B; b++) {
    swiglu(&gated[b * 2 * F], F);
    std::copy_n(&gated[b * 2 * F], F, &hidden[b * F]);
  }
  linear(hidden.data(), weights[5], normed.data(), B, d, F, threads);
  onto_x();
}

// 0, or 1 where memory ends: an exception that reached Python's side would end the process.
template <class Call>
static int guarded(Call call) {
  try {
    call();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

#define EXPORT(T)                                                                                                              \
  extern "C" int decode_##T(const T* q, const T* k, const T* v, T* out, float scale, const int64_t* sizes, int threads) {       \
    return guarded([=] { decode(q, k, v, out, scale, sizes, threads); });                                                      \
  }                                                                                                                            \
  extern "C" int linear_##T(const T* x, const T* w, T* out, int64_t M, int64_t N, int64_t K, int threads) {                     \
    return guarded([=] { linear(x, w, out, M, N, K, threads); });                                                              \
  }                                                                                                                            \
  extern "C" int rms_norm_##T(const T* x, const T* weight, T* out, int64_t M, int64_t K, float eps, int threads) {              \
    return guarded([=] { rms_norm(x, weight, out, M, K, eps, threads); });                                                     \
  }                                                                                                                            \
  extern "C" int block_##T(T* x, const T* const* weights, const T* cos, const T* sin, T* k, T* v, const int64_t* n, float eps, int threads) { \
    return guarded([=] { block(x, weights, cos, sin, k, v, n, eps, threads); });                                               \
  }
EXPORT(float)
EXPORT(bf16)
EXPORT(fp16)
