# On macOS only Apple silicon is built for: its GPUs are what the Metal kernels are written for, and
# each kernel file of the CPU is compiled for one processor.
set(architectures ${CMAKE_OSX_ARCHITECTURES})
if(NOT architectures)
  set(architectures ${CMAKE_SYSTEM_PROCESSOR})
endif()
if(NOT architectures STREQUAL "arm64")
  string(REPLACE ";" " and " architectures "${architectures}")
  message(FATAL_ERROR "flashmoe runs on Macs with Apple silicon and is being built for "
    "${architectures}. Take a Python for arm64 (python3 -c 'import platform; "
    "print(platform.machine())' says which one this is), and leave out universal2: "
    "ARCHFLAGS='-arch arm64' pip install flashmoe")
endif()
