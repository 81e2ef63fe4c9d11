//! The servers, images and tools that the end-to-end tests share.
