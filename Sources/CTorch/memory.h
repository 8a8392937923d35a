#ifndef CTORCH_MEMORY_H
#define CTORCH_MEMORY_H

namespace chunkgrpo {
/* Makes libtorch's CPU allocator keep large blocks that are freed; once a process. */
void keep_large_buffers();
}  // namespace chunkgrpo

#endif
