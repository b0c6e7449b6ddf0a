// SPDX-License-Identifier: Apache-2.0
// Of tests that scripts/launch starts on several ranks. All ranks leave with the same code, so that a failure on any of them is one.
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "mpi_world.hpp"
#include "session.hpp"

#include <mpi.h>

#include <cstdio>
#include <optional>

namespace {

std::optional<annulus::Communicator> communicator;

/// Longer than any wait of a test that works.
constexpr double kTimeoutSeconds = 120.0;

}  // namespace

#ifdef __SANITIZE_ADDRESS__
/// Leaks of MPI's own are known by the function below which they lie (sanitizers/leaks.supp), which takes whole stacks.
// NOLINTBEGIN(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp,readability-identifier-naming): the sanitizer's name
extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() { return "fast_unwind_on_malloc=0"; }
// NOLINTEND(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp,readability-identifier-naming)
#endif

const annulus::Communicator& annulus::test::world() { return *communicator; }

int main(int argc, char** argv) {
  annulus::prepare_gpu_connections();
  annulus::prepare_gpu_sharing();
  int provided = MPI_THREAD_SINGLE;
  if (MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided) != MPI_SUCCESS || provided != MPI_THREAD_MULTIPLE) {
    std::fprintf(stderr, "these tests need MPI_THREAD_MULTIPLE\n");
    return annulus::test::kFailed;
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);

  communicator.emplace(annulus::Communicator::world(kTimeoutSeconds));
  const int own = annulus::test::run_session(argc, argv);
  communicator.reset();

  // In the order of what wins: a failure anywhere, then a skip anywhere.
  const int mine[2] = {own == annulus::test::kFailed ? 1 : 0, own == annulus::test::kSkipped ? 1 : 0};
  int any[2] = {1, 0};
  if (MPI_Allreduce(mine, any, 2, MPI_INT, MPI_MAX, MPI_COMM_WORLD) != MPI_SUCCESS) { MPI_Abort(MPI_COMM_WORLD, annulus::test::kFailed); }
  MPI_Finalize();
  if (any[0] != 0) { return annulus::test::kFailed; }
  return any[1] != 0 ? annulus::test::kSkipped : annulus::test::kPassed;
}
