// SPDX-License-Identifier: Apache-2.0
// A rank of an annulus of another version, as far as all versions are alike: it enters MPI, sends the greeting and reads those of the
// others. With the argument `silent` it is a version that greets nobody.
#include <mpi.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

int main(int argc, char** argv) {
  int provided = 0;
  int size = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (argc > 1 && std::string_view(argv[1]) == "silent") {
    MPI_Barrier(MPI_COMM_WORLD);
    MPI_Finalize();
    return 0;
  }
  constexpr std::size_t kBytes = 64;
  std::vector<char> own(kBytes, '\0');
  std::memcpy(own.data(), "annulus", 7);
  std::memcpy(own.data() + 8, "9.8.7", 5);
  std::memcpy(own.data() + 32, "v9.8.7-6-gabcdef0", 17);
  std::vector<char> all(kBytes * static_cast<std::size_t>(size));
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Iallgather(own.data(), kBytes, MPI_CHAR, all.data(), kBytes, MPI_CHAR, MPI_COMM_WORLD, &request);
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  const bool alike = std::all_of(all.begin(), all.end(),
                                 [&](const char& byte) { return byte == own[static_cast<std::size_t>(&byte - all.data()) % kBytes]; });
  MPI_Finalize();
  return alike ? 0 : 2;
}
