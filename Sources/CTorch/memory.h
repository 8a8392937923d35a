#ifndef CTORCH_MEMORY_H
#define CTORCH_MEMORY_H

namespace chunkgrpo {
/* Makes libtorch's CPU allocator keep large blocks that are freed; once a process. */
void keep_large_buffers();
/* Gives back to the system what is kept and not in use. */
void release_kept_buffers();
}  // namespace chunkgrpo

#endif
