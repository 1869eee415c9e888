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

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

static Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
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
      for (int v = 0; v < VECTORS; ++v) w[v] = load(weights + v * kLanes);
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

static Shape shape_of(ffi::Span<const int64_t> x, ffi::Span<const int64_t> y, int64_t kernel, int64_t stride,
                      int64_t padding) {
  return {x[0], x[1], x[2], x[3], y[1], y[2], y[3], kernel, stride, padding};
}

static ffi::Error forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                          ffi::ResultBuffer<ffi::F32> y, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x.dimensions(), y->dimensions(), kernel.dimensions()[0], stride, padding);
  const int64_t vectors = s.features % (2 * kLanes) == 0 ? 2 : 1, block = vectors * kLanes;
  const int64_t taps = s.kernel * s.kernel * s.channels;
  std::vector<float> weights(taps * s.features);  // [features / block, taps, block]
  for (int64_t f = 0; f < s.features; f += block)
    for (int64_t t = 0; t < taps; ++t)
      std::memcpy(&weights[f * taps + t * block], kernel.typed_data() + t * s.features + f, block * sizeof(float));
  auto image = vectors == 2 ? forward_image<8, 2> : s.columns >= 16 ? forward_image<16, 1> : forward_image<8, 1>;
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
      for (int v = 0; v < VECTORS; ++v) d[v] = load(g + v * kLanes);
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

static ffi::Error gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> g,
                           ffi::ResultBuffer<ffi::F32> kernel, int64_t stride, int64_t padding) {
  const Shape s = shape_of(x.dimensions(), g.dimensions(), kernel->dimensions()[0], stride, padding);
  const int64_t size = kernel->element_count(), count = std::min<int64_t>(s.channels, 32);
  const int64_t chunks = std::min<int64_t>(s.batch, 8), slices = s.channels / count;  // sums do not depend on threads
  std::unique_ptr<float[]> partial(new float[chunks * size]());
  auto image = s.features % (2 * kLanes) == 0 ? gradient_image<8, 2> : gradient_image<16, 1>;
  parallel(pool, chunks * slices, [&](int64_t item) {
    static thread_local std::vector<float> padded;
    const int64_t chunk = item / slices, first = item % slices * count;
    for (int64_t b = s.batch * chunk / chunks; b < s.batch * (chunk + 1) / chunks; ++b) {
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
