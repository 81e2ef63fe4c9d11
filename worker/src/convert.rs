//! From the form that a destination wants of a layer to the API's words for it, and back. Other values: `occy_pipeline::wire`.

use occy_pipeline::compression::Compression;
use occy_pipeline::output::LayerForm;
use occy_proto::v1;

/// The form in which a destination takes layers, and the compression that it wants.
pub fn task_form(form: LayerForm) -> (v1::TaskForm, String) {
    match form {
        LayerForm::Nothing => (v1::TaskForm::Nothing, String::new()),
        LayerForm::Tar => (v1::TaskForm::Tar, String::new()),
        LayerForm::Stored { compression } => {
            (v1::TaskForm::Stored, compression.as_ref().map(Compression::to_string).unwrap_or_default())
        }
    }
}

/// The same from the API. None where it says what cannot be.
pub fn layer_form(form: v1::TaskForm, compression: &str) -> Option<LayerForm> {
    match (form, compression) {
        (v1::TaskForm::Nothing, "") => Some(LayerForm::Nothing),
        (v1::TaskForm::Tar, "") => Some(LayerForm::Tar),
        (v1::TaskForm::Stored, "") => Some(LayerForm::Stored { compression: None }),
        (v1::TaskForm::Stored, text) => Some(LayerForm::Stored { compression: Some(text.parse().ok()?) }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_come_back_as_they_were() {
        for form in [
            LayerForm::Nothing,
            LayerForm::Tar,
            LayerForm::Stored { compression: None },
            LayerForm::Stored { compression: Some(Compression::Zstd { level: 9 }) },
        ] {
            let (kind, text) = task_form(form);
            assert_eq!(layer_form(kind, &text), Some(form));
        }
        assert_eq!(layer_form(v1::TaskForm::Tar, "gzip"), None);
        assert_eq!(layer_form(v1::TaskForm::Unspecified, ""), None);
    }
}
