//! The service's API, as code generated from `occy/v1/*.proto`. The comments there are the API's documentation.
//!
//! By hand is only what is shown of messages with secrets: not these.

/// The first version of the API.
pub mod v1 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        reason = "generated: the .proto files document it"
    )]
    tonic::include_proto!("occy.v1");

    impl std::fmt::Debug for RegistryCredentials {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("RegistryCredentials").field("host", &self.host).finish_non_exhaustive()
        }
    }

    impl std::fmt::Debug for registry_credentials::Login {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Login").finish_non_exhaustive()
        }
    }

    impl std::fmt::Debug for AccessAnswer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("AccessAnswer").field("request_id", &self.request_id).finish_non_exhaustive()
        }
    }

    impl std::fmt::Debug for access_answer::Access {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Access").finish_non_exhaustive()
        }
    }

    impl std::fmt::Debug for UploadState {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("UploadState").field("offset", &self.offset).finish_non_exhaustive()
        }
    }

    impl std::fmt::Debug for PasswordLogin {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("PasswordLogin").finish_non_exhaustive()
        }
    }
}

/// The .proto files and what they import, compiled: what the reflection service answers from.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/occy.v1.bin"));
