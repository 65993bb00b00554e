// How much this process has communicated, by group and operation.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace mcore_bridge {

struct CommunicationCount {
  int64_t calls = 0;
  int64_t bytes = 0;       ///< of the whole tensor the operation is about, see communication_volume
  int64_t wire_bytes = 0;  ///< what this rank sends when the operation moves as little as it can
  int ranks = 1;           ///< of the group (the largest, when groups of one kind differ)
};

/// group kind ("tp", "cp", "dp-cp", "pp", ...) -> operation -> count since the start or the last reset. Counted where
/// the engine calls torch.distributed, for every group of more than one rank. With n ranks and a tensor of B bytes
/// (`bytes`) the operations and their `wire_bytes` are
///   all_reduce      B: the tensor                              2 (n-1)/n B
///   all_gather      B: the result, all ranks' parts together   (n-1)/n B
///   reduce_scatter  B: the input, all ranks' parts together    (n-1)/n B
///   all_to_all      B: the input                               (n-1)/n B
///   broadcast       B: the tensor                              B on the root, else 0
///   send, recv      B: the tensor                              B for send, 0 for recv
///   barrier         0                                          0
/// (the bandwidth-optimal amounts of a ring; a back end may choose another algorithm).
using CommunicationVolume = std::map<std::string, std::map<std::string, CommunicationCount>>;

CommunicationVolume communication_volume();
void reset_communication_volume();

}  // namespace mcore_bridge
