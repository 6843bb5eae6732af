#pragma once

#include <cstddef>

namespace ppo_fast::cpu {

// Asks for huge pages under a buffer that is about to be written for the first time, where the system leaves that to
// the program. The faults on 4 KiB pages take longer than computing a gradient into them. Its contents stay.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace ppo_fast::cpu
