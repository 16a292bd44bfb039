"""Random attention programs, compiled and compared with themselves run eagerly: the fuzzer."""
