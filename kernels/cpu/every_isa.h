// Compiles the file that includes it once a vector width, each in a namespace of its own.
//
//     #define FASTPPO_FILE "stem.cpp"
//     #include "every_isa.h"
//     namespace FASTPPO_ISA { ... the kernel ... }
//     #ifdef FASTPPO_LAST_ISA
//     ... what there is once: the entry point, which picks one of them at run time ...
//     #endif
//
// The file includes itself again under another target. System headers come before the first target:
// their inline functions must not be compiled for a processor that may not be there.
#ifndef FASTPPO_EVERY_ISA
#define FASTPPO_EVERY_ISA

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "abi.h"

#if defined(__x86_64__) && defined(__GLIBC__)
// glibc 2.29 gave these new versions, which leave errno alone and return the same numbers. The old
// ones are in every glibc, so that a library built today loads where there is 2.28.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

// What GCC sets for all that follows, Clang adds to each function.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define FASTPPO_ISA avx512
#define FASTPPO_LANES 16
#include FASTPPO_FILE
#undef FASTPPO_ISA
#undef FASTPPO_LANES

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTPPO_ISA avx2
#define FASTPPO_LANES 8
#include FASTPPO_FILE
#undef FASTPPO_ISA
#undef FASTPPO_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The function of the width that runs here, out of the three that were compiled.
#define FASTPPO_PICK(function)                        \
  (fastppo_isa() == FASTPPO_AVX512 ? avx512::function \
   : fastppo_isa() == FASTPPO_AVX2 ? avx2::function   \
                                   : portable::function)
#else
#define FASTPPO_PICK(function) portable::function
#endif

#define FASTPPO_ISA portable
#define FASTPPO_LANES 4
#define FASTPPO_LAST_ISA

#endif
