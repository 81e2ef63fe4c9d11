//! `API.md` is what the .proto files say. With `OCCYSTRAP_WRITE_REFERENCE=1` it is written anew.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use occy_proto::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

/// Field numbers of descriptor.proto, of which the paths of comments are made.
const FILE_MESSAGES: i32 = 4;
const FILE_ENUMS: i32 = 5;
const FILE_SERVICES: i32 = 6;
const FILE_SYNTAX: i32 = 12;
const PARTS: i32 = 2;

#[test]
fn the_reference_page_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("API.md");
    let page = page();
    if std::env::var_os("OCCYSTRAP_WRITE_REFERENCE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "proto/API.md is not what the .proto files say: run the test with OCCYSTRAP_WRITE_REFERENCE=1"
    );
}

fn page() -> String {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mut page = "# The API\n\nGenerated from the .proto files.\n".to_owned();
    // What is asked for stands before what it is asked for with, and what clients need before what only workers do.
    let order = ["pipeline", "schedule", "image", "worker", "blob"];
    let file = |name: &str| set.file.iter().find(|file| file.name() == format!("occy/v1/{name}.proto"));
    for name in order {
        File::new(file(name).unwrap()).write(&mut page).unwrap();
    }
    let ours = set.file.iter().filter(|file| file.package() == "occy.v1");
    assert_eq!(ours.count(), order.len(), "every file is in the page");
    page
}

struct File<'a> {
    file: &'a FileDescriptorProto,
    comments: HashMap<&'a [i32], &'a str>,
    /// The comment of the file itself.
    about: String,
}

impl<'a> File<'a> {
    fn new(file: &'a FileDescriptorProto) -> Self {
        let locations = || file.source_code_info.iter().flat_map(|info| &info.location);
        let comments = locations()
            .filter_map(|at| Some((at.path.as_slice(), at.leading_comments.as_deref()?)))
            .collect();
        let syntax = locations().find(|at| at.path == [FILE_SYNTAX]);
        let about = syntax.map(|at| at.leading_comments().to_owned()).unwrap_or_default();
        assert!(!about.is_empty(), "{} says what it is about", file.name());
        Self { file, comments, about }
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "\n## {}\n\n{}", self.file.name(), text(&self.about))?;
        for (at, service) in (0..).zip(&self.file.service) {
            self.write_service(page, service, &[FILE_SERVICES, at])?;
        }
        for (at, message) in (0..).zip(&self.file.message_type) {
            self.write_message(page, message, &[FILE_MESSAGES, at])?;
        }
        for (at, kind) in (0..).zip(&self.file.enum_type) {
            self.write_enum(page, kind, &[FILE_ENUMS, at])?;
        }
        Ok(())
    }

    fn write_service(
        &self,
        page: &mut String,
        service: &ServiceDescriptorProto,
        path: &[i32],
    ) -> std::fmt::Result {
        writeln!(page, "\n### service {}\n\n{}", service.name(), self.comment(path))?;
        for (at, rpc) in (0..).zip(&service.method) {
            let (input, output) = (link(rpc.input_type()), link(rpc.output_type()));
            let [from, to] = [rpc.client_streaming(), rpc.server_streaming()]
                .map(|streams| if streams { "stream of " } else { "" });
            let comment = self.comment(&[path, &[PARTS, at]].concat());
            writeln!(page, "\n#### {}\n\n{from}{input} → {to}{output}\n\n{comment}", rpc.name())?;
        }
        Ok(())
    }

    fn write_message(&self, page: &mut String, message: &DescriptorProto, path: &[i32]) -> std::fmt::Result {
        writeln!(page, "\n### {}\n\n{}", message.name(), self.comment(path))?;
        for (at, field) in (0..).zip(&message.field) {
            let comment = self.comment(&[path, &[PARTS, at]].concat()).replace('\n', "\n  ");
            writeln!(page, "- `{}` = {}, {}: {comment}", field.name(), field.number(), kind(message, field))?;
        }
        Ok(())
    }

    fn write_enum(&self, page: &mut String, kind: &EnumDescriptorProto, path: &[i32]) -> std::fmt::Result {
        writeln!(page, "\n### enum {}\n\n{}", kind.name(), self.comment(path))?;
        for (at, value) in (0..).zip(&kind.value) {
            let comment = self.comment(&[path, &[PARTS, at]].concat());
            writeln!(page, "- `{}` = {}: {comment}", value.name(), value.number())?;
        }
        Ok(())
    }

    fn comment(&self, path: &[i32]) -> String {
        text(self.comments.get(path).unwrap_or_else(|| panic!("{path:?} has a comment")))
    }
}

/// A comment without the blank that stands before each of its lines. Indented lines stay what they are in Markdown: code.
fn text(comment: &str) -> String {
    let lines = comment.trim_end().lines().map(|line| match line.strip_prefix(' ') {
        // Markdown wants four blanks where the comment has two.
        Some(line) if line.starts_with("  ") => format!("  {line}"),
        Some(line) => line.to_owned(),
        None => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn kind(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let name = match field.r#type() {
        Type::Message | Type::Enum => link(field.type_name()),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    match field.oneof_index.map(|at| &message.oneof_decl[usize::try_from(at).unwrap()]) {
        _ if field.label() == Label::Repeated => format!("repeated {name}"),
        _ if field.proto3_optional() => format!("optional {name}"),
        Some(oneof) => format!("{name}, one of `{}`", oneof.name()),
        None => name,
    }
}

/// A link to another type of ours; the name of one of Google's.
fn link(name: &str) -> String {
    match name.strip_prefix(".occy.v1.") {
        Some(own) if is_enum(own) => format!("[{own}](#enum-{})", own.to_lowercase()),
        Some(own) => format!("[{own}](#{})", own.to_lowercase()),
        None => name.trim_start_matches('.').to_owned(),
    }
}

fn is_enum(name: &str) -> bool {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    set.file.iter().flat_map(|file| &file.enum_type).any(|kind| kind.name() == name)
}
