// SPDX-License-Identifier: Apache-2.0
// What the address sanitizer of a program that tests launch goes by. They launch hundreds, and to unwind the stack of every allocation of
// MPI_Init as the tests on several ranks do (mpi_main.cpp) takes a rank seconds. So here a leak is known by the library that allocated it,
// and what our own calls of MPI leave behind is found by those tests.

// NOLINTBEGIN(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp,readability-identifier-naming): the sanitizer's names

extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() {
  return "leak:libmpi.so\n"
         "leak:libopen-\n"
         "leak:mca_\n"
         "leak:libpmix\n"
         "leak:libevent\n"
         "leak:libhwloc\n"
         // They print into memory that libc allocates for them.
         "leak:vasprintf\n";
}

/// Keeps plugins in memory: of one that is gone nobody can say that it was it that allocated.
extern "C" int dlclose(void* library);
extern "C" int dlclose(void* /*library*/) { return 0; }

// NOLINTEND(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp,readability-identifier-naming)
