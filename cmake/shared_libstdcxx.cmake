# Some compilers link libstdc++ statically. A copy inside our libraries has streams and locales of its own, beside those of the
# libstdc++ that torch loads, and the first number printed through both crashes. Here the one that the system has is named first.
#
# shared_libstdcxx(<target>): <target> and all that link it use the system's shared libstdc++.
function(shared_libstdcxx target)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT UNIX OR APPLE)
    return()
  endif()
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/shared_libstdcxx)
  file(WRITE ${folder}/print.cpp "#include <sstream>\nint main() { std::ostringstream text; text << 42; return text.str().size() != 2; }\n")
  try_compile(MCB_PRINTS ${folder} ${folder}/print.cpp COPY_FILE ${folder}/print)
  if(NOT MCB_PRINTS)
    return()
  endif()
  file(STRINGS ${folder}/print needed REGEX "libstdc\\+\\+\\.so\\.6" LIMIT_COUNT 1)
  if(needed)
    return()
  endif()
  find_file(MCB_LIBSTDCXX libstdc++.so.6 PATHS /usr/lib64 /usr/lib /lib64 /lib
            PATH_SUFFIXES ${CMAKE_LIBRARY_ARCHITECTURE} ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
  if(NOT MCB_LIBSTDCXX)
    message(WARNING "${CMAKE_CXX_COMPILER} links libstdc++ statically and no libstdc++.so.6 was found (set MCB_LIBSTDCXX): errors that print "
                    "numbers may crash beside torch's own libstdc++")
    return()
  endif()
  message(STATUS "${CMAKE_CXX_COMPILER} links libstdc++ statically; using ${MCB_LIBSTDCXX}")
  target_link_options(${target} PUBLIC "LINKER:--push-state,--no-as-needed,${MCB_LIBSTDCXX},--pop-state")
endfunction()
