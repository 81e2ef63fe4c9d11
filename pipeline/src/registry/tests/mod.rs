//! The client against servers that do what real ones do on bad days.

mod server;
