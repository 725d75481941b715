// What an adapter adds to a linear layer, and its gradients: blocks of tokens, then blocks of columns, spread over
// threads. No number depends on how many there are.
#include <algorithm>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/sizes.h"

namespace lowrank {
namespace {

constexpr int64_t kSmallestBlock = 12, kTokenBlock = 48;  // whole tiles of 6 and of 12 tokens
constexpr int64_t kWidthBlock = 512;                      // of a factor, to be packed
constexpr int64_t kColumnBlock = 96;                      // of a gradient
constexpr int64_t kPackingWork = 24;                      // products that take as long as packing an element
constexpr int64_t kThreadWork = 1 << 19;                  // products that one thread should have at least: some 10 µs

int threads_for(int64_t products, int threads) {
  return usable_threads(std::max<int64_t>(1, products / kThreadWork), threads);
}

template <class Body>
void for_blocks(int64_t size, int64_t block, int threads, const Body& body) {
  const int64_t count = (size + block - 1) / block;
  parallel_for(count, usable_threads(count, threads),
               [&](int64_t b, int worker) { body(b * block, std::min(block, size - b * block), worker); });
}

// Blocks of the input's width and of the output's, in one parallel region: body(whether it is the input's, first,
// count).
template <class Body>
void for_blocks_of_both(int64_t in, int64_t out, int64_t block, int threads, const Body& body) {
  const int64_t in_blocks = (in + block - 1) / block, count = in_blocks + (out + block - 1) / block;
  parallel_for(count, usable_threads(count, threads), [&](int64_t b, int) {
    const bool is_in = b < in_blocks;
    const int64_t first = (is_in ? b : b - in_blocks) * block;
    body(is_in, first, std::min(block, (is_in ? in : out) - first));
  });
}

// Blocks of tokens, smaller ones where there are few.
int64_t token_block(int64_t tokens, int threads) {
  return std::clamp(round_up((tokens + threads - 1) / threads, kSmallestBlock), kSmallestBlock, kTokenBlock);
}

// Rows [first, first + count) of panel (width, pitch) = [F₁ᵀ F₂ᵀ … 0] for factors (r, width).
template <class T>
void pack_rows(const std::vector<const void*>& factors, int64_t r, int64_t width, int64_t first, int64_t count,
               T* panel, int64_t pitch) {
  int64_t k = 0;
  for (const void* factor : factors) {
    kernels<T>().rows_from_columns(static_cast<const T*>(factor) + first, width, count, r, panel + first * pitch + k,
                                   pitch);
    k += r;
  }
  for (int64_t i = first; i < first + count; ++i) std::fill(panel + i * pitch + k, panel + (i + 1) * pitch, T(0));
}

// The same of [F₁ F₂ … 0] for factors (width, r).
template <class T>
void pack_columns(const std::vector<const void*>& factors, int64_t r, int64_t first, int64_t count, T* panel,
                  int64_t pitch) {
  for (int64_t i = first; i < first + count; ++i) {
    T* to = panel + i * pitch;
    for (const void* factor : factors) to = std::copy_n(static_cast<const T*>(factor) + i * r, r, to);
    std::fill(to, panel + (i + 1) * pitch, T(0));
  }
}

// Columns [first, first + count) of panel (·, pitch) = [F₁ F₂ …]ᵀ for factors (width, r), padded.
template <class T>
void pack_transposed(const std::vector<const void*>& factors, int64_t r, int64_t first, int64_t count, T* panel,
                     int64_t pitch) {
  for (const void* factor : factors) {
    kernels<T>().columns_from_rows(static_cast<const T*>(factor) + first * r, r, count, r, panel + first, pitch);
    panel += r * pitch;
  }
}

// Rows [first, first + count) of the activations beside each other, (count, pitch): read, or written.
template <class T>
void gather(const std::vector<Activation>& through, int64_t r, int64_t first, int64_t count, T* rows, int64_t pitch) {
  for (const Activation& part : through) {
    const T* const from = static_cast<const T*>(part.data) + first * part.stride;
    for (int64_t t = 0; t < count; ++t) std::copy_n(from + t * part.stride, r, rows + t * pitch);
    rows += r;
  }
}

template <class T>
void scatter(const T* rows, int64_t pitch, int64_t r, int64_t first, int64_t count,
             const std::vector<Activation>& through) {
  for (const Activation& part : through) {
    T* const to = static_cast<T*>(part.data) + first * part.stride;
    for (int64_t t = 0; t < count && part.data != nullptr; ++t) std::copy_n(rows + t * pitch, r, to + t * part.stride);
    rows += r;
  }
}

template <class T>
void forward(const AdapterLayer& layer, const AdapterForward& call, int allowed) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t tokens = layer.tokens, d_in = layer.d_in, d_out = layer.d_out, r = layer.r, k = layer.width();
  const int64_t pitch = round_up(k, kernel.lanes), up_pitch = padded_rows(d_out);
  const int threads = threads_for(tokens * k * (d_in + d_out), allowed);
  const int64_t block = token_block(tokens, threads);
  const int64_t down_size = round_up(d_in * pitch, 16), up_size = k * up_pitch, u_size = block * pitch;
  const Scratch scratch(static_cast<size_t>(down_size + up_size + threads * u_size) * sizeof(T), 1);
  T *const down = scratch.of<T>(0), *const up = down + down_size, *const us = up + up_size;
  std::vector<const T*> up_rows(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) up_rows[i] = up + i * up_pitch;
  for_blocks_of_both(d_in, d_out, kWidthBlock, threads_for(kPackingWork * k * (d_in + d_out), threads),
                     [&](bool is_in, int64_t first, int64_t count) {
                       is_in ? pack_rows(layer.downs, r, d_in, first, count, down, pitch)
                             : pack_transposed(layer.ups, r, first, count, up, up_pitch);
                     });
  const T *const x = static_cast<const T*>(call.x), scale = static_cast<T>(layer.scale);
  T* const y = static_cast<T*>(call.y);
  for_blocks(tokens, block, threads, [&](int64_t first, int64_t count, int worker) {
    T* const u = us + worker * u_size;
    if (x != nullptr) {
      kernel.project_rows(x + first * d_in, d_in, count, d_in, down, pitch, T(1), u);
      scatter(u, pitch, r, first, count, call.through);
    } else {
      gather(call.through, r, first, count, u, pitch);
    }
    if (y == nullptr) return;
    for (int64_t i = 0; i < count * pitch; ++i) u[i] *= scale;
    kernel.expand_rows(u, pitch, count, k, up_rows.data(), d_out, y + first * d_out, d_out);
  });
}

template <class T>
void backward(const AdapterLayer& layer, const AdapterBackward& call, int allowed) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t tokens = layer.tokens, d_in = layer.d_in, d_out = layer.d_out, r = layer.r, k = layer.width();
  const int64_t pitch = round_up(k, kernel.lanes);
  const T *const grad = static_cast<const T*>(call.grad), scale = static_cast<T>(layer.scale);
  const bool needs_p = k > 0 && (call.grad_x != nullptr || call.grad_a != nullptr || !call.through.empty());
  const int64_t products = tokens * (needs_p ? k * d_out : 0) + tokens * (call.grad_x ? k * d_in : 0) +
                           tokens * r * ((call.grad_a ? d_in : 0) + (call.grad_b ? d_out : 0));
  const int threads = threads_for(products, allowed);
  const int64_t panel_size = needs_p ? round_up(d_out * pitch, 16) : 0;
  const int64_t p_size = needs_p ? round_up(tokens * pitch, 16) : 0, b_size = call.grad_b ? r * d_out : 0;
  const Scratch scratch(static_cast<size_t>(panel_size + p_size + b_size) * sizeof(T), 1);
  T *const panel = scratch.of<T>(0), *const p = panel + panel_size, *const of_b = p + p_size;
  if (needs_p) {
    for_blocks(d_out, kWidthBlock, threads_for(kPackingWork * k * d_out, threads),
               [&](int64_t first, int64_t count, int) { pack_columns(layer.ups, r, first, count, panel, pitch); });
    std::vector<const T*> down_rows;
    for (const void* down : layer.downs) {
      for (int64_t i = 0; i < r; ++i) down_rows.push_back(static_cast<const T*>(down) + i * d_in);
    }
    for_blocks(tokens, token_block(tokens, threads), threads, [&](int64_t first, int64_t count, int) {
      T* const rows = p + first * pitch;
      if (grad != nullptr) {
        kernel.project_rows(grad + first * d_out, d_out, count, d_out, panel, pitch, scale, rows);
        scatter(rows, pitch, r, first, count, call.through);
      } else {
        gather(call.through, r, first, count, rows, pitch);
      }
      if (call.grad_x == nullptr) return;
      T* const to = static_cast<T*>(call.grad_x) + first * d_in;
      if (call.before != nullptr) std::copy_n(static_cast<const T*>(call.before) + first * d_in, count * d_in, to);
      kernel.expand_rows(rows, pitch, count, k, down_rows.data(), d_in, to, d_in);
    });
  }
  for_blocks_of_both(call.grad_a ? d_in : 0, call.grad_b ? d_out : 0, kColumnBlock, threads,
                     [&](bool is_in, int64_t first, int64_t count) {
                       const int64_t last = first + count;
                       if (is_in) {
                         kernel.sum_over_tokens(p, pitch, r, static_cast<const T*>(call.x), d_in, tokens, first, last,
                                                static_cast<T*>(call.grad_a), d_in);
                         return;
                       }
                       kernel.sum_over_tokens(static_cast<const T*>(call.hidden.data), call.hidden.stride, r, grad,
                                              d_out, tokens, first, last, of_b, d_out);
                       T* const to = static_cast<T*>(call.grad_b);
                       for (int64_t j = first; j < last; ++j) {
                         for (int64_t i = 0; i < r; ++i) to[j * r + i] = scale * of_b[i * d_out + j];
                       }
                     });
}

}  // namespace

void run_adapter(DType dtype, const AdapterLayer& layer, const AdapterForward& call, int threads) {
  if (layer.tokens == 0 || layer.r == 0) return;
  with_compute_type(dtype, [&](auto t) { forward<decltype(t)>(layer, call, threads); });
}

void run_adapter_backward(DType dtype, const AdapterLayer& layer, const AdapterBackward& call, int threads) {
  if (layer.r == 0) return;
  with_compute_type(dtype, [&](auto t) { backward<decltype(t)>(layer, call, threads); });
}

}  // namespace lowrank
