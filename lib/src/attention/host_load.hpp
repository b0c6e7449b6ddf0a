// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/io/source.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/pattern/partition.hpp>

#include <cstdint>
#include <functional>
#include <span>

namespace annulus {

/// What one rank of a host takes of the tensors: rows of some batch entries.
struct HostBox {
  std::int64_t batch = 0;
  std::int64_t batches = 0;
  Shard shard;
};

/// Takes rows [first, first + count) of a batch entry of a tensor from a source that has them.
using TakeRows = std::function<void(const TensorSource&, Tensor, std::int64_t batch, std::int64_t first, std::int64_t count)>;

/// Bytes that load_on_host() holds at most, besides what reading `source` keeps.
std::int64_t host_load_bytes(const TensorSource& source, Tensor tensor);

/// Reads a tensor that has bands, together with the other ranks of this host: each chunk is read and decoded by one of them, which sends
/// the others their rows. `take` is called for all rows of this rank. Collective over the ranks of the host, also where one of them fails:
/// its exception comes at the end.
/// @param boxes  of the ranks of this host, by their position among them
/// @throws as TensorSource::read()
void load_on_host(const TensorSource& source, Tensor tensor, const Communicator& comm, std::span<const HostBox> boxes,
                  const TakeRows& take);

}  // namespace annulus
