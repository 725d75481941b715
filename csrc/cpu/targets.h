// Which instruction sets this compiler can target for this machine, and how.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define LOWRANK_X86_TARGETS 1
#endif
