#include "cpu/kernels.h"

#include <atomic>

#include "cpu/targets.h"

namespace lowrank {

#define LOWRANK_DECLARE(isa)                              \
  namespace isa {                                         \
  template <class T>                                      \
  const Kernels<T>& table();                              \
  extern template const Kernels<float>& table<float>();   \
  extern template const Kernels<double>& table<double>(); \
  }
LOWRANK_DECLARE(portable)
#if defined(LOWRANK_X86_TARGETS)
LOWRANK_DECLARE(avx2)
LOWRANK_DECLARE(avx512)
#endif
#undef LOWRANK_DECLARE

namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels<float>& (*float_kernels)();
  const Kernels<double>& (*double_kernels)();
};

const InstructionSet kSets[] = {
#if defined(LOWRANK_X86_TARGETS)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2");
     },
     avx512::table<float>, avx512::table<double>},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); },
     avx2::table<float>, avx2::table<double>},
#endif
    {"portable", [] { return true; }, portable::table<float>, portable::table<double>},
};

const InstructionSet* best() {
  for (const InstructionSet& set : kSets) {
    if (set.supported()) return &set;
  }
  return nullptr;  // not reached: the portable set is always supported
}

std::atomic<const InstructionSet*> current{best()};

}  // namespace

const char* instruction_set() { return current.load()->name; }

bool use_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.supported()) {
      current.store(&set);
      return true;
    }
  }
  return false;
}

template <>
const Kernels<float>& kernels<float>() {
  return current.load(std::memory_order_relaxed)->float_kernels();
}
template <>
const Kernels<double>& kernels<double>() {
  return current.load(std::memory_order_relaxed)->double_kernels();
}

}  // namespace lowrank
