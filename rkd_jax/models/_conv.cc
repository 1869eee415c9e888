// Float32 convolutions for CPUs, NHWC and HWIO: the sum over taps and channels in vector registers, without im2col.
// A block of outputs, PIXELS of a row by VECTORS of channels, stays in registers while its sum runs.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// A vector is one register of this processor: the compiler takes wider ones apart through memory. And a block leaves
// registers for its weights and its pixel.
#if defined(__AVX512F__)  // 32 of 16 floats
constexpr int64_t kLanes = 16;
constexpr int kPixels = 8, kVectors = 2;
#elif defined(__AVX__)  // 16 of 8
constexpr int64_t kLanes = 8;
constexpr int kPixels = 4, kVectors = 2;
#elif defined(__aarch64__)  // 32 of 4
constexpr int64_t kLanes = 4;
constexpr int kPixels = 4, kVectors = 4;
#else  // 16 of 4
constexpr int64_t kLanes = 4;
constexpr int kPixels = 4, kVectors = 2;
#endif
constexpr int64_t kBlock = kVectors * kLanes;  // channels
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

static Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
// Without it, GCC loads a vector for each of its products, and these wait for the loads.
static Vector in_register(Vector v) {
#if defined(__AVX__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
  return v;
}
static void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// Calls work(i) for i < count on the pool and on this thread, which takes part, so that a full pool cannot block it.
static void parallel(ffi::ThreadPool pool, int64_t count, std::function<void(int64_t)> work) {
  struct State {
    std::function<void(int64_t)> work;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
    void run() {
      int64_t mine = 0;
      for (int64_t i; (i = next++) < count; ++mine) work(i);
      if (mine && (done += mine) == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  };
  auto state = std::make_shared<State>();
  state->work = std::move(work);
  state->count = count;
  for (int64_t i = 1; i < std::min(count, pool.num_threads()); ++i) pool.Schedule([state] { state->run(); });
  state->run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == count; });
}

struct Shape {
  int64_t batch, height, width, channels;  // of the input
  int64_t rows, columns, features;         // of the output
  int64_t kernel, stride, padding;
  int64_t dilation = 1;  // of the input: zeros between its pixels
  int64_t padded_height() const { return (rows - 1) * stride + kernel; }
  int64_t padded_width() const { return (columns - 1) * stride + kernel; }
};

// Channels first ... first + count of an image with zeros around it, [padded_height, padded_width, lanes >= count].
static void pad(const Shape& s, const float* image, int64_t first, int64_t count, std::vector<float>& out,
                int64_t lanes) {
  const int64_t width = s.padded_width();
  out.assign(s.padded_height() * width * lanes, 0.0f);
  for (int64_t y = 0; y < s.height; ++y) {
    const int64_t row = y * s.dilation + s.padding;
    if (row >= s.padded_height()) break;
    const int64_t pixels = std::min(s.width, (width - s.padding + s.dilation - 1) / s.dilation);
    float* to = out.data() + (row * width + s.padding) * lanes;
    const float* from = image + y * s.width * s.channels + first;
    if (lanes == s.channels && s.dilation == 1) {
      std::memcpy(to, from, pixels * lanes * sizeof(float));
    } else if (count == kLanes) {
      for (int64_t x = 0; x < pixels; ++x) store(to + x * s.dilation * lanes, load(from + x * s.channels));
    } else {
      for (int64_t x = 0; x < pixels; ++x)
        std::memcpy(to + x * s.dilation * lanes, from + x * s.channels, count * sizeof(float));
    }
  }
}

template <int PIXELS, int VECTORS>
static void forward_block(const Shape& s, const float* in, const float* weights, float* out) {
  Vector sum[PIXELS][VECTORS] = {};
  const int64_t step = s.stride * s.channels;
  for (int64_t i = 0; i < s.kernel; ++i) {
    const float* row = in + i * s.padded_width() * s.channels;
    for (int64_t k = 0; k < s.kernel * s.channels; ++k, weights += VECTORS * kLanes) {  // taps of a row are adjacent
      Vector w[VECTORS];
      for (int v = 0; v < VECTORS; ++v) w[v] = in_register(load(weights + v * kLanes));
#pragma GCC unroll 16
      for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[p][v] += w[v] * row[p * step + k];
    }
  }
  for (int p = 0; p < PIXELS; ++p)
    for (int v = 0; v < VECTORS; ++v) store(out + p * s.features + v * kLanes, sum[p][v]);
}

template <int PIXELS, int VECTORS>
static void forward_image(const Shape& s, const float* padded, const float* weights, float* out) {
  const int64_t block = VECTORS * kLanes, taps = s.kernel * s.kernel * s.channels;
  for (int64_t f = 0; f < s.features; f += block)
    for (int64_t y = 0; y < s.rows; ++y)
      for (int64_t x = 0; x < s.columns; x += PIXELS) {
        const int64_t start = std::min(x, s.columns - PIXELS);  // the last block of a row may overlap
        forward_block<PIXELS, VECTORS>(s, padded + (y * s.padded_width() + start) * s.stride * s.channels,
                                       weights + f * taps, out + (y * s.columns + start) * s.features + f);
      }
}

// sum[c][o] += x[pixel][c] * g[pixel][o] over an image, for one tap.
template <int CHANNELS, int VECTORS>
static void gradient_block(const Shape& s, const float* in, int64_t count, const float* g, float* out) {
  Vector sum[CHANNELS][VECTORS];
  for (int c = 0; c < CHANNELS; ++c)
    for (int v = 0; v < VECTORS; ++v) sum[c][v] = load(out + c * s.features + v * kLanes);
  for (int64_t y = 0; y < s.rows; ++y) {
    const float* pixel = in + y * s.stride * s.padded_width() * count;
    for (int64_t x = 0; x < s.columns; ++x, pixel += s.stride * count, g += s.features) {
      Vector d[VECTORS];
      for (int v = 0; v < VECTORS; ++v) d[v] = in_register(load(g + v * kLanes));
#pragma GCC unroll 16
      for (int c = 0; c < CHANNELS; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[c][v] += d[v] * pixel[c];
    }
  }
  for (int c = 0; c < CHANNELS; ++c)
    for (int v = 0; v < VECTORS; ++v) store(out + c * s.features + v * kLanes, sum[c][v]);
}

template <int CHANNELS, int VECTORS>
static void gradient_image(const Shape& s, const float* padded, int64_t count, const float* g, float* out) {
  for (int64_t f = 0; f < s.features; f += VECTORS * kLanes)
    for (int64_t i = 0; i < s.kernel; ++i)
      for (int64_t j = 0; j < s.kernel; ++j)
        for (int64_t c = 0; c < count; c += CHANNELS)
          gradient_block<CHANNELS, VECTORS>(s, padded + (i * s.padded_width() + j) * count + c, count, g + f,
                                            out + ((i * s.kernel + j) * s.channels + c) * s.features + f);
}

// The blocks of these shapes: where the features do not come in whole ones, half as wide and, if they can be, longer.
static bool is_whole(const Shape& s) { return s.features % kBlock == 0; }
static int64_t block_of(const Shape& s) { return is_whole(s) ? kBlock : kBlock / 2; }

static auto forward_of(const Shape& s) {
  if (is_whole(s)) return forward_image<kPixels, kVectors>;
  return s.columns >= 2 * kPixels ? forward_image<2 * kPixels, kVectors / 2> : forward_image<kPixels, kVectors / 2>;
}

static auto gradient_of(const Shape& s) {
  return is_whole(s) ? gradient_image<kPixels, kVectors> : gradient_image<2 * kPixels, kVectors / 2>;
}

// Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): a tile of 2 by 2 outputs takes 16 products instead of 36, of the
// 4 by 4 inputs under it and of the kernel, each transformed: y = A'[(G k G') * (B' x B)]A. Over channels and tiles
// they are 16 matrix products, which the blocks above compute. In the gradient A and G change sides. With few channels
// the transforms cost what the products save.

static bool is_winograd(const Shape& s) {
  return s.kernel == 3 && s.stride == 1 && s.channels % kLanes == 0 && std::min(s.channels, s.features) >= 64;
}

static int64_t tiles_of(const Shape& s) { return (s.rows + 1) / 2 * ((s.columns + 1) / 2); }
static int64_t tiles_at_once(int64_t channels) { return channels > 256 ? 16 : 32; }  // in a core's cache

// The 16 numbers of a tile lie in 16 planes, a cache line wider than needed: at powers of 2 they would share cache lines.
static int64_t plane_of(int64_t tiles, int64_t channels) { return tiles * channels + 16; }

static void transform_input(const Vector d[16], float* to, int64_t stride) {  // B' d B
  Vector r[16];
  for (int j = 0; j < 4; ++j) {
    r[j] = d[j] - d[8 + j];
    r[4 + j] = d[4 + j] + d[8 + j];
    r[8 + j] = d[8 + j] - d[4 + j];
    r[12 + j] = d[4 + j] - d[12 + j];
  }
  for (int i = 0; i < 16; i += 4) {
    store(to + i * stride, r[i] - r[i + 2]);
    store(to + (i + 1) * stride, r[i + 1] + r[i + 2]);
    store(to + (i + 2) * stride, r[i + 2] - r[i + 1]);
    store(to + (i + 3) * stride, r[i + 1] - r[i + 3]);
  }
}

static void transform_output(const float* from, int64_t stride, Vector y[4]) {  // A' m A
  Vector r[8];
  for (int j = 0; j < 4; ++j) {
    const Vector m0 = load(from + j * stride), m1 = load(from + (4 + j) * stride);
    const Vector m2 = load(from + (8 + j) * stride), m3 = load(from + (12 + j) * stride);
    r[j] = m0 + m1 + m2;
    r[4 + j] = m1 - m2 - m3;
  }
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = r[4 * i] + r[4 * i + 1] + r[4 * i + 2];
    y[2 * i + 1] = r[4 * i + 1] - r[4 * i + 2] - r[4 * i + 3];
  }
}

static void transform_output_back(const Vector y[4], float* to, int64_t stride) {  // A y A'
  Vector r[8];
  for (int j = 0; j < 2; ++j) {
    r[j] = y[j];
    r[2 + j] = y[j] + y[2 + j];
    r[4 + j] = y[j] - y[2 + j];
    r[6 + j] = -y[2 + j];
  }
  for (int i = 0; i < 4; ++i) {
    store(to + 4 * i * stride, r[2 * i]);
    store(to + (4 * i + 1) * stride, r[2 * i] + r[2 * i + 1]);
    store(to + (4 * i + 2) * stride, r[2 * i] - r[2 * i + 1]);
    store(to + (4 * i + 3) * stride, -r[2 * i + 1]);
  }
}

static void transform_kernel(const float* from, int64_t from_stride, float* to, int64_t stride) {  // G k G'
  Vector r[12];
  for (int j = 0; j < 3; ++j) {
    const Vector k0 = load(from + j * from_stride), k1 = load(from + (3 + j) * from_stride);
    const Vector k2 = load(from + (6 + j) * from_stride);
    r[j] = k0;
    r[3 + j] = 0.5f * (k0 + k1 + k2);
    r[6 + j] = 0.5f * (k0 - k1 + k2);
    r[9 + j] = k2;
  }
  for (int i = 0; i < 4; ++i) {
    const Vector k0 = r[3 * i], k1 = r[3 * i + 1], k2 = r[3 * i + 2];
    store(to + 4 * i * stride, k0);
    store(to + (4 * i + 1) * stride, 0.5f * (k0 + k1 + k2));
    store(to + (4 * i + 2) * stride, 0.5f * (k0 - k1 + k2));
    store(to + (4 * i + 3) * stride, k2);
  }
}

static void transform_kernel_back(const float* from, int64_t stride, float* to, int64_t to_stride) {  // += G' m G
  Vector r[12];
  for (int j = 0; j < 4; ++j) {
    const Vector m1 = load(from + (4 + j) * stride), m2 = load(from + (8 + j) * stride);
    r[j] = load(from + j * stride) + 0.5f * (m1 + m2);
    r[4 + j] = 0.5f * (m1 - m2);
    r[8 + j] = load(from + (12 + j) * stride) + 0.5f * (m1 + m2);
  }
  for (int i = 0; i < 3; ++i) {
    const Vector *m = r + 4 * i, sum = 0.5f * (m[1] + m[2]);
    store(to + 3 * i * to_stride, m[0] + sum);
    store(to + (3 * i + 1) * to_stride, 0.5f * (m[1] - m[2]));
    store(to + (3 * i + 2) * to_stride, m[3] + sum);
  }
}

// The SIZE by SIZE pixels from the corner of a tile on: pointers; pixels outside of the image are `outside`.
template <int SIZE, typename Float>
static void pixels_of(const Shape& s, int64_t tile, Float* images, int64_t height, int64_t width, int64_t channels,
                      int64_t padding, Float* outside, Float* found[SIZE * SIZE]) {
  const int64_t wide = (s.columns + 1) / 2, in_image = tile % tiles_of(s);
  const int64_t top = in_image / wide * 2 - padding, left = in_image % wide * 2 - padding;
  Float* image = images + tile / tiles_of(s) * height * width * channels;
  for (int64_t y = top; y < top + SIZE; ++y)
    for (int64_t x = left; x < left + SIZE; ++x) {
      const bool inside = 0 <= y && y < height && 0 <= x && x < width;
      *found++ = inside ? image + (y * width + x) * channels : outside;
    }
}

// Channels first ... first + count under a tile, transformed; `zeros` [channels].
static void tile_of_input(const Shape& s, const float* x, int64_t tile, int64_t first, int64_t count,
                          const float* zeros, float* to, int64_t stride) {
  const float* pixels[16];
  pixels_of<4>(s, tile, x, s.height, s.width, s.channels, s.padding, zeros, pixels);
  for (int64_t c = 0; c < count; c += kLanes) {
    Vector d[16];
    for (int p = 0; p < 16; ++p) d[p] = load(pixels[p] + first + c);
    transform_input(d, to + c, stride);
  }
}

static ffi::Error winograd(ffi::ThreadPool pool, const Shape& s, const float* x, const float* kernel, float* y) {
  const int64_t block = block_of(s), count = tiles_at_once(s.channels), total = s.batch * tiles_of(s);
  const int64_t in_plane = plane_of(count, s.channels), out_plane = plane_of(count, block);
  std::unique_ptr<float[]> weights(new float[16 * s.channels * s.features]);  // [features / block, 16, channels, block]
  parallel(pool, s.features / block, [&](int64_t f) {
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t v = 0; v < block; v += kLanes)
        transform_kernel(kernel + c * s.features + f * block + v, s.channels * s.features,
                         &weights[(f * 16 * s.channels + c) * block + v], s.channels * block);
  });
  Shape product = {};
  product.rows = product.kernel = product.stride = 1;
  product.columns = count, product.channels = s.channels, product.features = block;
  auto multiply = forward_of(product);
  parallel(pool, (total + count - 1) / count, [&](int64_t item) {
    static thread_local std::vector<float> in, out, nowhere;
    in.resize(16 * in_plane), out.resize(16 * out_plane), nowhere.assign(s.channels, 0.0f);
    float outside[kBlock];
    const int64_t begin = item * count, end = std::min(begin + count, total);
    for (int64_t t = begin; t < end; ++t)
      tile_of_input(s, x, t, 0, s.channels, nowhere.data(), &in[(t - begin) * s.channels], in_plane);
    for (int64_t f = 0; f < s.features; f += block) {
      for (int64_t p = 0; p < 16; ++p)
        multiply(product, &in[p * in_plane], &weights[(f * 16 + p * block) * s.channels], &out[p * out_plane]);
      for (int64_t t = begin; t < end; ++t) {
        float* pixels[4];
        pixels_of<2>(s, t, y + f, s.rows, s.columns, s.features, 0, outside, pixels);
        for (int64_t v = 0; v < block; v += kLanes) {
          Vector tile[4];
          transform_output(&out[(t - begin) * block + v], out_plane, tile);
          for (int p = 0; p < 4; ++p) store(pixels[p] + v, tile[p]);
        }
      }
    }
  });
  return ffi::Error::Success();
}

// The gradient of the kernel, [3, 3, channels, features], for channels first ... first + count, over images begin ... end.
static void winograd_gradient(const Shape& s, const float* x, const float* g, int64_t begin, int64_t end, int64_t first,
                              int64_t count, float* kernel) {
  static thread_local std::vector<float> in, out, sums, zeros;
  const int64_t at_once = tiles_at_once(s.features), last = end * tiles_of(s);
  const int64_t in_plane = plane_of(at_once, count), out_plane = plane_of(at_once, s.features);
  const int64_t sums_plane = plane_of(count, s.features);
  in.resize(16 * in_plane), out.resize(16 * out_plane);
  sums.assign(16 * sums_plane, 0.0f), zeros.assign(std::max(s.channels, s.features), 0.0f);
  Shape product = {};
  product.rows = product.kernel = product.stride = 1;
  product.channels = count, product.features = s.features;
  auto multiply = gradient_of(s);
  for (int64_t tile = begin * tiles_of(s); tile < last; tile += at_once) {
    product.columns = std::min(at_once, last - tile);
    for (int64_t t = 0; t < product.columns; ++t) {
      tile_of_input(s, x, tile + t, first, count, zeros.data(), &in[t * count], in_plane);
      const float* pixels[4];
      pixels_of<2>(s, tile + t, g, s.rows, s.columns, s.features, 0, static_cast<const float*>(zeros.data()), pixels);
      for (int64_t v = 0; v < s.features; v += kLanes) {
        const Vector d[4] = {load(pixels[0] + v), load(pixels[1] + v), load(pixels[2] + v), load(pixels[3] + v)};
        transform_output_back(d, &out[t * s.features + v], out_plane);
      }
    }
    for (int64_t p = 0; p < 16; ++p)
      multiply(product, &in[p * in_plane], count, &out[p * out_plane], &sums[p * sums_plane]);
  }
  for (int64_t c = 0; c < count; ++c)
    for (int64_t v = 0; v < s.features; v += kLanes)
      transform_kernel_back(&sums[c * s.features + v], sums_plane, kernel + (first + c) * s.features + v,
                            s.channels * s.features);
}

static Shape shape_of(ffi::Span<const int64_t> x, ffi::Span<const int64_t> y, int64_t kernel, int64_t stride,
                      int64_t padding) {
  return {x[0], x[1], x[2], x[3], y[1], y[2], y[3], kernel, stride, padding};
}

static ffi::Error forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                          ffi::ResultBuffer<ffi::F32> y, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x.dimensions(), y->dimensions(), kernel.dimensions()[0], stride, padding);
  if (is_winograd(s)) return winograd(pool, s, x.typed_data(), kernel.typed_data(), y->typed_data());
  const int64_t block = block_of(s), taps = s.kernel * s.kernel * s.channels;
  std::vector<float> weights(taps * s.features);  // [features / block, taps, block]
  for (int64_t f = 0; f < s.features; f += block)
    for (int64_t t = 0; t < taps; ++t)
      std::memcpy(&weights[f * taps + t * block], kernel.typed_data() + t * s.features + f, block * sizeof(float));
  auto image = forward_of(s);
  parallel(pool, s.batch, [&](int64_t b) {
    static thread_local std::vector<float> padded;
    const float* in = x.typed_data() + b * s.height * s.width * s.channels;
    if (s.kernel > 1 || s.stride > 1 || s.padding > 0) {
      pad(s, in, 0, s.channels, padded, s.channels);
      in = padded.data();
    }
    image(s, in, weights.data(), y->typed_data() + b * s.rows * s.columns * s.features);
  });
  return ffi::Error::Success();
}

static ffi::Error gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> g,
                           ffi::ResultBuffer<ffi::F32> kernel, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x.dimensions(), g.dimensions(), kernel->dimensions()[0], stride, padding);
  const int64_t size = kernel->element_count(), count = std::min<int64_t>(s.channels, 32);
  const int64_t chunks = std::min<int64_t>(s.batch, 8), slices = s.channels / count;  // sums do not depend on threads
  std::unique_ptr<float[]> partial(new float[chunks * size]());
  auto image = gradient_of(s);
  parallel(pool, chunks * slices, [&](int64_t item) {
    static thread_local std::vector<float> padded;
    const int64_t chunk = item / slices, first = item % slices * count;
    const int64_t begin = s.batch * chunk / chunks, end = s.batch * (chunk + 1) / chunks;
    if (is_winograd(s)) {
      return winograd_gradient(s, x.typed_data(), g.typed_data(), begin, end, first, count,
                               partial.get() + chunk * size);
    }
    for (int64_t b = begin; b < end; ++b) {
      pad(s, x.typed_data() + b * s.height * s.width * s.channels, first, count, padded, count);
      image(s, padded.data(), count, g.typed_data() + b * s.rows * s.columns * s.features,
            partial.get() + chunk * size + first * s.features);
    }
  });
  float* out = kernel->typed_data();
  std::memcpy(out, partial.get(), size * sizeof(float));
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) out[i] += partial[chunk * size + i];
  return ffi::Error::Success();
}

// Depthwise: one filter of 3 by 3 a channel, a vector of channels at a time.

static Vector load_some(const float* p, int64_t count) {
  if (count == kLanes) return load(p);
  float some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(float));
  return load(some);
}

static void store_some(float* p, Vector v, int64_t count) {
  if (count == kLanes) return store(p, v);
  std::memcpy(p, &v, count * sizeof(float));
}

static ffi::Error depthwise(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                            ffi::ResultBuffer<ffi::F32> y, int64_t stride, int64_t padding, int64_t dilation) {
  Shape s = shape_of(x.dimensions(), y->dimensions(), 3, stride, padding);
  s.dilation = dilation;
  const int64_t blocks = (s.channels + kLanes - 1) / kLanes;
  parallel(pool, s.batch * blocks, [&](int64_t item) {
    static thread_local std::vector<float> padded;
    const int64_t image = item / blocks, first = item % blocks * kLanes;
    const int64_t count = std::min(kLanes, s.channels - first), row = s.padded_width() * kLanes;
    pad(s, x.typed_data() + image * s.height * s.width * s.channels, first, count, padded, kLanes);
    Vector w[9];
    for (int t = 0; t < 9; ++t) w[t] = load_some(kernel.typed_data() + t * s.channels + first, count);
    float* out = y->typed_data() + image * s.rows * s.columns * s.channels + first;
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t j = 0; j < s.columns; ++j, out += s.channels) {
        const float* in = padded.data() + i * stride * row + j * stride * kLanes;
        Vector sum = {};
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) sum += w[t] * load(in + t / 3 * row + t % 3 * kLanes);
        store_some(out, sum, count);
      }
  });
  return ffi::Error::Success();
}

static ffi::Error depthwise_gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> g,
                                     ffi::ResultBuffer<ffi::F32> kernel, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x.dimensions(), g.dimensions(), 3, stride, padding);
  const int64_t blocks = (s.channels + kLanes - 1) / kLanes;
  parallel(pool, blocks, [&](int64_t block) {
    static thread_local std::vector<float> padded;
    const int64_t first = block * kLanes, count = std::min(kLanes, s.channels - first), row = s.padded_width() * kLanes;
    Vector total[9] = {};
    for (int64_t b = 0; b < s.batch; ++b) {
      pad(s, x.typed_data() + b * s.height * s.width * s.channels, first, count, padded, kLanes);
      const float* d = g.typed_data() + b * s.rows * s.columns * s.channels + first;
      Vector sum[9] = {};
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < s.columns; ++j, d += s.channels) {
          const float* in = padded.data() + i * stride * row + j * stride * kLanes;
          const Vector v = load_some(d, count);
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) sum[t] += v * load(in + t / 3 * row + t % 3 * kLanes);
        }
      for (int t = 0; t < 9; ++t) total[t] += sum[t];
    }
    for (int t = 0; t < 9; ++t) store_some(kernel->typed_data() + t * s.channels + first, total[t], count);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(rkd_conv, forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride").Attr<int64_t>("padding"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rkd_conv_gradient, gradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride").Attr<int64_t>("padding"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rkd_depthwise, depthwise,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("dilation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rkd_depthwise_gradient, depthwise_gradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("stride").Attr<int64_t>("padding"));
