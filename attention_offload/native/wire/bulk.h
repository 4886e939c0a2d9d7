// Bulk KV: bytes between a socket and pieces of memory, wherever these lie, in as few system calls as it takes.
#pragma once

#include <sys/uio.h>

#include <vector>

#include "wire/frame.h"

namespace farshore::wire {

// In the order of the pieces, all of them, or an exception: HungUp, Broken, or Late when no byte has moved for `idle_s`
// seconds (below 0: never). The socket stays the caller's.
void send_pieces(int fd, std::vector<iovec> pieces, double idle_s);
void receive_pieces(int fd, std::vector<iovec> pieces, double idle_s);

}  // namespace farshore::wire
