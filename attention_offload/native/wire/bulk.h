// Bulk KV: moves bytes between a socket and pieces of memory, in as few system calls as possible.
#pragma once

#include <sys/uio.h>

#include <vector>

#include "wire/frame.h"

namespace farshore::wire {

// Move all pieces in their order. Throw Late when no byte has moved for `idle_s` seconds (below 0: no limit), HungUp
// if the other end closed the connection before the first byte, Broken on other errors. The socket stays the caller's.
void send_pieces(int fd, std::vector<iovec> pieces, double idle_s);
void receive_pieces(int fd, std::vector<iovec> pieces, double idle_s);

}  // namespace farshore::wire
