//! The real binary against real registries, with faults in between and independent tools to judge the outcome.

mod harness;
